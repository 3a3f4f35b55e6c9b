"""The store: a model's frozen weights in one safetensors file on disk, in which a whole block is one aligned read.

    8 bytes │ JSON header, padded │ record │ padding │ record │ …        a record begins at a multiple of 4,096 bytes
                                    its tensors, each at a multiple of 64 bytes

A record is loaded and freed as a whole: a decoder block, the embedding, the head. Any safetensors reader can read the file; gaps
are tensors `padding.N`. The metadata name the model, and the store of another model is refused.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.disk import FULL, create, open_buffered, written_whole
from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text
from lorakeet.kernels.host_copies import to_device

CPU = torch.device("cpu")
PAGE, LINE = 4096, 64  # bytes: what a record and a tensor are aligned to
NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_REFUSALS = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "the quota of its disk is used up",
    errno.EFBIG: "a limit on the size of files ends before that",
    errno.EROFS: "its disk is read-only",
}
_REMEDY = "Delete it: it is made again."
_ENTRY_BYTES = 256  # header bytes reserved for each tensor
_PADDING = "padding."


class StoreRefused(EnvironmentProblem):
    """The store cannot be written: the disk is full or read-only."""


@dataclass(frozen=True)
class TensorLocation:
    """Dtype, shape and byte range of a tensor in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte in the file
    end: int


@dataclass(frozen=True)
class StoreRecord:
    """Tensors that lie together: their byte range, and each by its name without the record's."""

    begin: int
    end: int
    tensors: Mapping[str, TensorLocation]

    @property
    def bytes(self) -> int:
        """Length of the record, gaps between its tensors included."""
        return self.end - self.begin

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Returns the tensors as views into `buffer` (bytes,), which starts with the record."""
        found, whole = {}, {}
        for name, span in self.tensors.items():
            size = span.dtype.itemsize
            if span.dtype not in whole:
                whole[span.dtype] = buffer[: len(buffer) // size * size].view(span.dtype)
            strides = [prod(span.shape[axis + 1 :]) for axis in range(len(span.shape))]
            found[name] = whole[span.dtype].as_strided(span.shape, strides, (span.begin - self.begin) // size)
        return found


class StoreWriter:
    """Writes records one after the other, so that at most one is in memory; `new_store` makes it."""

    def __init__(self, file: Any, header_bytes: int) -> None:
        self._file = file
        self._start = -(-(8 + header_bytes) // PAGE) * PAGE
        self._at = self._start
        self._header: dict[str, Any] = {}
        self._padding = 0

    def add(self, record: str, tensors: Mapping[str, Tensor]) -> None:
        """Appends `tensors` as the record `record`; each name may occur once."""
        self._pad(PAGE)
        for name, tensor in tensors.items():
            self._pad(LINE)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._note(f"{record}.{name}", NAMES[tensor.dtype], list(tensor.shape), flat.nbytes)
            self._file.write(raw_bytes(flat) if flat.numel() else b"")

    def finish(self, identity: Mapping[str, str]) -> None:
        """Writes the header before the records; ValueError if it is longer than the reserved space."""
        text = json.dumps({"__metadata__": dict(sorted(identity.items())), **self._header}, separators=(",", ":")).encode()
        if len(text) > self._start - 8:
            raise ValueError(f"the header takes {len(text):,} bytes, but {self._start - 8:,} are reserved")
        self._file.seek(0)
        self._file.write((self._start - 8).to_bytes(8, "little"))
        self._file.write(text + b" " * (self._start - 8 - len(text)))

    def begin(self) -> None:
        """Reserves space for the header."""
        self._file.write(bytes(self._start))

    def _pad(self, alignment: int) -> None:
        missing = -self._at % alignment
        if missing:
            self._note(f"{_PADDING}{self._padding}", "U8", [missing], missing)
            self._padding += 1
            self._file.write(bytes(missing))

    def _note(self, name: str, dtype: str, shape: list[int], size: int) -> None:
        if name in self._header:
            raise ValueError(f"the store already has a tensor {name}")
        begin = self._at - self._start
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        self._at += size


@contextmanager
def new_store(path: Path, *, identity: Mapping[str, str], tensors: int, size: int = 0) -> Iterator[StoreWriter]:
    """A context that writes a store, which appears at `path` whole or not at all. `identity` describes the model.

    `tensors` is at least the number of its tensors, `size` about their bytes. Raises StoreRefused if the folder cannot be
    written or the disk is too full.
    """
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise StoreRefused(
                f"The store {path} needs {bytes_text(size)}, but its disk has {bytes_text(free)} free. Free some space, or name "
                "a folder on another disk with memory.store."
            )
        with written_whole(path) as made, create(made) as file:
            writer = StoreWriter(file, header_bytes=(2 * tensors + 16) * _ENTRY_BYTES)
            writer.begin()
            yield writer
            writer.finish(identity)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """A context that turns errors of the disk into StoreRefused."""
    try:
        yield
    except OSError as error:
        why = _REFUSALS.get(error.errno or 0, error.strerror)
        first = "Free some space, or name" if error.errno in FULL else "Name"
        raise StoreRefused(f"The store {path} cannot be written: {why}. {first} another folder with memory.store.") from error


class WeightStore:
    """An open store. The file is read, not mapped, so that only the buffers are resident."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity, self.tensors = _read_header(path)
        self._descriptor = os.open(path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._descriptor)  # also without a call of `close`

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str]) -> WeightStore:
        """Opens the store at `path`; DataError if it is damaged or of another model than `identity`."""
        store = cls(path)
        wrong = [name for name, value in identity.items() if store.identity.get(name) != value]
        if wrong:
            store.close()
            found = {name: store.identity.get(name, "not named") for name in wrong}
            which = "; ".join(f"{name} is {found[name][:40]}, not {identity[name][:40]}" for name in wrong)
            raise DataError(
                f"The store {path} holds another model ({which}). Delete it, or name another folder with memory.store."
            )
        return store

    def record(self, name: str) -> StoreRecord:
        """Returns the record of that name; KeyError if there is none."""
        tensors = {key[len(name) + 1 :]: span for key, span in self.tensors.items() if key.startswith(f"{name}.")}
        if not tensors:
            raise KeyError(name)
        return StoreRecord(min(span.begin for span in tensors.values()), max(span.end for span in tensors.values()), tensors)

    def read(self, begin: int, into: Tensor) -> None:
        """Fills the contiguous `into` with the bytes from `begin` on; DataError if the file ends before."""
        view = raw_bytes(into)
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], begin + done)
            if count == 0:
                raise DataError(f"The store {self.path} ends at byte {begin + done:,}; it was cut off. {_REMEDY}")
            done += count

    def tensor(self, name: str) -> Tensor:
        """Returns a copy of one tensor, by its full name."""
        span = self.tensors[name]
        found = torch.empty(span.shape, dtype=span.dtype)
        self.read(span.begin, found.view(-1))
        return found

    def rows(self, name: str, device: torch.device = CPU) -> StoredRows:
        """Returns the tensor of that name for reading some rows at a time, onto `device`."""
        return StoredRows(self, name, device)

    def close(self) -> None:
        """Closes the file."""
        self._closing()


class StoredRows:
    """A tensor in the store, read some rows at a time: an embedding, the weight of a head, a stack of experts."""

    def __init__(self, store: WeightStore, name: str, device: torch.device = CPU) -> None:
        self._store, self._location, self.device = store, store.tensors[name], device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor."""
        return self._location.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, …)."""
        return self._location.shape

    def __getitem__(self, part: slice) -> Tensor:
        """Returns the rows of `part` (step 1) as a new tensor."""
        start, stop, _ = part.indices(self.shape[0])
        found = torch.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)
        self._store.read(self._location.begin + start * self._row, found)
        return found.to(self.device)

    def gather(self, rows: Sequence[int]) -> Tensor:
        """Returns the given rows (len(rows), …), with one read each."""
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for number, row in enumerate(rows):
            self._store.read(self._location.begin + row * self._row, found[number])
        return to_device(found, self.device)

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the row of each of `ids` (…) as (…, columns), with one read for each different id.

        Where the ids are on the host, nothing waits for a device.
        """
        wanted, indices = torch.unique(ids, return_inverse=True)
        return nn.functional.embedding(to_device(indices, self.device), self.gather(wanted.tolist()))

    @property
    def _row(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor, for reading or writing."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorLocation]]:
    """Returns the metadata and the tensors of a store, without padding; DataError if the file is incomplete."""
    try:
        with open_buffered(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise DataError(f"The store {path} is {size:,} bytes long, too short for its header; it was cut off. {_REMEDY}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise DataError(f"There is no store {path}.") from None
    except ValueError as error:
        raise DataError(f"The store {path} has a damaged header ({error}). {_REMEDY}") from error
    start, identity = 8 + length, header.pop("__metadata__", {})
    tensors = {name: _location(entry, start) for name, entry in header.items()}
    wrong = [name for name, span in tensors.items() if span.end - span.begin != prod(span.shape) * span.dtype.itemsize]
    end = max((span.end for span in tensors.values()), default=start)
    if wrong or end != size:
        lengths = f"it is {size:,} bytes long, but its header describes {end:,}"
        what = f"'{wrong[0]}' has another size than its shape" if wrong else lengths
        raise DataError(f"The store {path} is damaged: {what}. {_REMEDY}")
    return identity, {name: span for name, span in tensors.items() if not name.startswith(_PADDING)}


def _location(entry: Mapping[str, Any], start: int) -> TensorLocation:
    begin, end = entry["data_offsets"]
    return TensorLocation(DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, start + end)

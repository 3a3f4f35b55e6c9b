"""The store: a model's frozen weights in one safetensors file on disk, laid out so that a whole block is one aligned read.

    8 bytes │ JSON header, padded │ record │ padding │ record │ …        a record begins at a multiple of 4,096 bytes
                                    its tensors, each at a multiple of 64 bytes

A record is what comes in and leaves together: a decoder block, the embedding, the head. The file can be read by anything that
reads safetensors; what fills the gaps is called `padding.N`. It names the model whose weights it holds, and that of another
model is refused.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import DataError, EnvironmentProblem

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
    errno.EROFS: "its disk is read-only",
}
_ROOM_WOULD_DO = (errno.ENOSPC, errno.EDQUOT)
_REMEDY = "Delete it: it is made again."
_ROOM = 256  # header bytes that are set aside for each tensor
_PADDING = "padding."


class StoreRefused(EnvironmentProblem):
    """The disk takes no store."""


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte in the file
    end: int


@dataclass(frozen=True)
class StoreRecord:
    """Tensors that lie together: where, and each by its name without the record's."""

    begin: int
    end: int
    tensors: Mapping[str, TensorLocation]

    @property
    def bytes(self) -> int:
        """How long the record is, gaps between its tensors included."""
        return self.end - self.begin

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors as views into `buffer` (bytes,), which holds the record from its first byte on."""
        found, whole = {}, {}
        for name, place in self.tensors.items():
            size = place.dtype.itemsize
            if place.dtype not in whole:
                whole[place.dtype] = buffer[: len(buffer) // size * size].view(place.dtype)
            strides = [prod(place.shape[axis + 1 :]) for axis in range(len(place.shape))]
            found[name] = whole[place.dtype].as_strided(place.shape, strides, (place.begin - self.begin) // size)
        return found


class StoreWriter:
    """Takes records one after the other, so that no more than one has to be in memory; `new_store` makes it."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._start = _up(8 + room, PAGE)
        self._at = self._start
        self._header: dict[str, Any] = {}
        self._padding = 0

    def add(self, record: str, tensors: Mapping[str, Tensor]) -> None:
        """Appends `tensors` as the record `record`; a name may be used once."""
        self._pad(PAGE)
        for name, tensor in tensors.items():
            self._pad(LINE)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._note(f"{record}.{name}", NAMES[tensor.dtype], list(tensor.shape), flat.nbytes)
            self._file.write(raw_bytes(flat) if flat.numel() else b"")

    def finish(self, identity: Mapping[str, str]) -> None:
        """Writes the header before the records; ValueError where it is longer than the room that was set aside."""
        text = json.dumps({"__metadata__": dict(sorted(identity.items())), **self._header}, separators=(",", ":")).encode()
        if len(text) > self._start - 8:
            raise ValueError(f"the header takes {len(text):,} bytes, but {self._start - 8:,} were set aside")
        self._file.seek(0)
        self._file.write((self._start - 8).to_bytes(8, "little"))
        self._file.write(text + b" " * (self._start - 8 - len(text)))

    def begin(self) -> None:
        """Leaves room for the header."""
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
    """A store in the making, which appears at `path` whole or not at all. `identity` names the model; plain words.

    `tensors` is at least the number of tensors that will come, `size` about their bytes. Raises StoreRefused where the
    folder cannot be written or the disk has no room.
    """
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise StoreRefused(
                f"The store {path} needs {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free. Free some space, or "
                "name a folder on another disk with memory.store."
            )
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                writer = StoreWriter(file, room=(2 * tensors + 16) * _ROOM)
                writer.begin()
                yield writer
                writer.finish(identity)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What the system refuses, in words."""
    try:
        yield
    except OSError as error:
        why = _REFUSALS.get(error.errno or 0, error.strerror)
        first = "Free some space, or name" if error.errno in _ROOM_WOULD_DO else "Name"
        raise StoreRefused(f"The store {path} cannot be written: {why}. {first} another folder with memory.store.") from error


class WeightStore:
    """An open store. Reads go around the process's memory map, so that only the buffers they fill are resident."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity, self.tensors = _read_header(path)
        self._descriptor = os.open(path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._descriptor)  # also where nobody calls `close`

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str]) -> WeightStore:
        """The store at `path`; DataError where it is damaged or holds another model than `identity` says."""
        store = cls(path)
        wrong = [name for name, value in identity.items() if store.identity.get(name) != value]
        if wrong:
            store.close()
            held = {name: store.identity.get(name, "not named") for name in wrong}
            which = "; ".join(f"{name} is {held[name][:40]}, not {identity[name][:40]}" for name in wrong)
            raise DataError(
                f"The store {path} holds another model ({which}). Delete it, or name another folder with memory.store."
            )
        return store

    def record(self, name: str) -> StoreRecord:
        """The record of that name; KeyError where the store has none."""
        tensors = {key[len(name) + 1 :]: place for key, place in self.tensors.items() if key.startswith(f"{name}.")}
        if not tensors:
            raise KeyError(name)
        return StoreRecord(min(place.begin for place in tensors.values()), max(place.end for place in tensors.values()), tensors)

    def read(self, begin: int, into: Tensor) -> None:
        """Fills the contiguous `into` with the bytes from `begin` on; DataError where the file ends before."""
        view = raw_bytes(into)
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], begin + done)
            if count == 0:
                raise DataError(f"The store {self.path} ends at byte {begin + done:,}; it was cut off. {_REMEDY}")
            done += count

    def tensor(self, name: str) -> Tensor:
        """A fresh copy of one tensor, by its whole name."""
        place = self.tensors[name]
        found = torch.empty(place.shape, dtype=place.dtype)
        self.read(place.begin, found.view(-1))
        return found

    def rows(self, name: str, device: torch.device = CPU) -> StoredRows:
        """The tensor of that name, to be read some rows at a time, which then go to `device`."""
        return StoredRows(self, name, device)

    def close(self) -> None:
        """Closes the file."""
        self._closing()


class StoredRows:
    """A tensor in the store of which some rows at a time are read: an embedding, the weight of a head, a stack of experts."""

    def __init__(self, store: WeightStore, name: str, device: torch.device = CPU) -> None:
        self._store, self._place, self.device = store, store.tensors[name], device

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self._place.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, …)."""
        return self._place.shape

    def __getitem__(self, part: slice) -> Tensor:
        """The rows of `part`, whose step is 1, as a fresh tensor."""
        start, stop, _ = part.indices(self.shape[0])
        found = torch.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)
        self._store.read(self._place.begin + start * self._row, found)
        return found.to(self.device)

    def gather(self, rows: Sequence[int]) -> Tensor:
        """Those rows (len(rows), …), one read each."""
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for place, row in enumerate(rows):
            self._store.read(self._place.begin + row * self._row, found[place])
        return found.to(self.device)

    def look_up(self, ids: Tensor) -> Tensor:
        """The row of each of `ids` (…) as (…, columns); one read for each that differs."""
        wanted, places = torch.unique(ids, return_inverse=True)
        return nn.functional.embedding(places.to(self.device), self.gather(wanted.tolist()))

    @property
    def _row(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to be read or written."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorLocation]]:
    """The metadata and the tensors of a store, paddings left out; DataError where the file is not whole."""
    try:
        with path.open("rb") as file:
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
    tensors = {name: _place(entry, start) for name, entry in header.items()}
    wrong = [name for name, place in tensors.items() if place.end - place.begin != prod(place.shape) * place.dtype.itemsize]
    end = max((place.end for place in tensors.values()), default=start)
    if wrong or end != size:
        lengths = f"it is {size:,} bytes long, but its header describes {end:,}"
        what = f"'{wrong[0]}' does not fill its place" if wrong else lengths
        raise DataError(f"The store {path} is damaged: {what}. {_REMEDY}")
    return identity, {name: place for name, place in tensors.items() if not name.startswith(_PADDING)}


def _place(entry: Mapping[str, Any], start: int) -> TensorLocation:
    begin, end = entry["data_offsets"]
    return TensorLocation(DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, start + end)


def _up(number: int, multiple: int) -> int:
    return number + -number % multiple

"""Safetensors files, checked before use and written tensor by tensor.

    8 bytes: length n of the header, little endian │ n bytes: JSON header │ the tensors' bytes, without gaps

The header is not trusted: its length, every dtype, shape and byte range is checked against the file before a tensor is read.
Reading and writing keep one tensor at a time in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorakeet.core.tiled_product import RowSource, matrix_shape
from lorakeet.disk import create, open_buffered, write_whole, written_whole
from lorakeet.errors import DataError, Problems, readable, require_regular
from lorakeet.formats.files.json_object import parse_object, read_object

LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_MOST_DIMENSIONS = 64  # torch's own limit
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Dtype, shape and byte range of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True, eq=False)
class Header:
    """A checked header: all that follows from its bytes and the length of the file, so that files can share it.

    It must not be changed. Two are equal only if they are one object.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    start: int  # where in the file the tensors begin
    size: int  # of the file

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The names in the order in which the tensors lie in the file."""
        return tuple(sorted(self.tensors, key=lambda name: (self.tensors[name].begin, self.tensors[name].end)))

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The dtype of all tensors; None if there are several or no tensors."""
        found = {stored.dtype for stored in self.tensors.values()}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def has_empty(self) -> bool:
        """True if some tensor has no numbers."""
        return any(0 in stored.shape for stored in self.tensors.values())

    @cached_property
    def outline(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the file as fp32 meta tensors."""
        return tuple(torch.empty(self.tensors[name].shape, device="meta", dtype=torch.float32) for name in self.order)

    @cached_property
    def count(self) -> int:
        """The number of numbers in all tensors."""
        return sum(math.prod(stored.shape) for stored in self.tensors.values())


@dataclass(frozen=True)
class SafeFile:
    """A checked file: its tensors by name, read one at a time."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    finite: bool = False  # known to have no NaN and no infinity
    header: Header | None = None  # if files can share it (formats/files/loaded_file)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, as a copy."""
        stored, data = self.tensors[name], self.bytes_of(name)
        if not data:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)

    def numbers(self) -> Tensor | None:
        """All numbers of the file in fp32, in its order; None if tensors must be read one by one."""
        return None

    def rows(self, name: str) -> RowSource:
        """The tensor `name`, readable some rows at a time; a vector is read whole."""
        stored = self.tensors[name]
        return self.read(name) if len(stored.shape) < 2 else _FileRows(self, name, stored.shape)

    def bytes_of(self, name: str) -> bytearray:
        """The bytes of the tensor `name`."""
        stored = self.tensors[name]
        return self.bytes_between(stored.begin, stored.end)

    def bytes_between(self, begin: int, end: int) -> bytearray:
        """Bytes `begin` to `end` of the file; DataError if it is shorter."""
        data = bytearray(end - begin)
        with readable(self.path), open_buffered(self.path) as file:
            file.seek(begin)
            count = file.readinto(data)
        if count != len(data):
            raise DataError(f"{self.path} became shorter while it was read. Fetch the file again.")
        return data


@dataclass(frozen=True)
class _FileRows:
    """A tensor of a file, read some rows at a time (core/tiled_product.RowSource)."""

    file: SafeFile
    name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.file.tensors[self.name].dtype

    def as_matrix(self) -> _FileRows:
        """The tensor as a matrix, all dimensions but the last flattened to rows (core/tiled_product.StackedRows)."""
        return _FileRows(self.file, self.name, matrix_shape(self.shape))

    def __getitem__(self, part: slice) -> Tensor:
        stored = self.file.tensors[self.name]
        start, stop, _ = part.indices(self.shape[0])
        row = (stored.end - stored.begin) // max(self.shape[0], 1)
        shape = (max(0, stop - start), *self.shape[1:])
        if not math.prod(shape):
            return torch.empty(shape, dtype=stored.dtype)
        data = self.file.bytes_between(stored.begin + start * row, stored.begin + stop * row)
        return torch.frombuffer(data, dtype=stored.dtype).view(shape)


def open_safetensors(path: Path) -> SafeFile:
    """Returns the checked header of `path`. DataError names the file and everything that is wrong with it."""
    require_regular(path)
    with readable(path), open_buffered(path) as file:
        raw, size = read_header(path, file)
    header = check_header(path, raw, size)
    return SafeFile(path, header.tensors, header.metadata)


def read_header(path: Path, file: BinaryIO | FileIO, longest: int = LARGEST_HEADER) -> tuple[bytes, int]:
    """Returns the header's bytes and the length of the file, and leaves `file` at the first tensor. DataError, OSError.

    `longest`: bytes of a header that is taken.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise DataError(
            f"{path} is not a whole safetensors file: it is {size:,} bytes long and declares a header of "
            f"{length:,} bytes. It may have been cut off; fetch it again."
        )
    if length > longest:
        raise DataError(
            f"{path} has a header of {length:,} bytes; expected at most {longest:,}. It has tensors of another model."
        )
    raw = file.read(length)
    if len(raw) != length:
        raise DataError(f"{path} became shorter while it was read. Fetch the file again.")
    return raw, size


def check_header(path: Path, raw: bytes, size: int) -> Header:
    """Parses and checks the header `raw` of a file of `size` bytes. DataError names `path` and everything that is wrong."""
    expected = "a table of tensors. Fetch the file again"
    header = parse_object(raw, f"{path} is not a safetensors file: its header", expected=expected)
    metadata = header.pop("__metadata__", None) or {}  # mlx writes null
    about: Any = {"remedy": "Fetch the file again.", "code": "file-malformed", "values": {"path": str(path)}}
    problems = Problems(f"{path} is not a sound safetensors file", DataError, **about)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.add(f"{path}: __metadata__ is not a table of texts.")
        metadata = {}
    start = 8 + len(raw)
    tensors: dict[str, TensorEntry] = {}
    for name, entry in header.items():
        found = _entry(entry, start)
        if isinstance(found, str):
            problems.add(f"{path}: tensor {name!r} {found}")
        else:
            tensors[name] = found
    problems.raise_if_any()
    _check_ranges(path, tensors, start, size)
    return Header(tensors, metadata, start, size)


def read_index(path: Path) -> dict[str, str]:
    """The file name of each tensor, from the index `path` of a sharded model.

    DataError if it is no such index, or names anything but files in its own folder.
    """
    home = read_object(path, expected="an index of shards").get("weight_map")
    if not isinstance(home, dict) or not all(isinstance(file, str) for file in home.values()):
        raise DataError(f"{path} has no weight_map from tensor names to file names. Fetch the file again.")
    odd = sorted({file for file in home.values() if Path(file).name != file or file in ("", "..") or "\0" in file})
    if odd:
        raise DataError(
            f"{path} names files outside of its folder: {', '.join(odd[:8])}. They are not opened; expected names of files "
            "beside it. Fetch the model again."
        )
    return home


def _entry(entry: Any, start: int) -> TensorEntry | str:
    """The parsed entry, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "has an entry without exactly dtype, shape and data_offsets."
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the dtype {dtype!r}; readable are {', '.join(DTYPES)}."
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return f"has the shape {shape!r} and the byte range {offsets!r}; both must be lists of whole numbers of 0 or more."
    largest = max([0, *shape, *offsets])
    if len(shape) > _MOST_DIMENSIONS or largest >= 2**63:
        return (
            f"has {len(shape):,} dimensions and numbers of up to {len(str(largest)):,} digits; expected at most "
            f"{_MOST_DIMENSIONS} dimensions and numbers below 2^63."
        )
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        return f"has {end - begin:,} bytes; shape {shape} in {dtype} needs {expected:,}."
    return TensorEntry(DTYPES[dtype], tuple(shape), start + begin, start + end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_ranges(path: Path, tensors: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Raises DataError unless the byte ranges fill the file without gaps and overlaps."""
    position = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != position:
            what = "overlaps another tensor" if stored.begin < position else "leaves bytes before it that belong to no tensor"
            where = f"byte {stored.begin:,}, expected {position:,}"
            raise DataError(f"{path}: tensor {name!r} {what} ({where}). Fetch the file again.")
        position = stored.end
    if position != size:
        what = "it was cut off" if position > size else "it has bytes that belong to no tensor"
        raise DataError(f"{path} is {size:,} bytes long, but its header describes {position:,}: {what}; fetch it again.")


def stream_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    *,
    fetch: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes `path`, asking `fetch` for one tensor after the other; the bytes depend on names and numbers alone.

    The header is written first, from `shapes` (dtype and shape by name). A tensor that differs from it raises ValueError.
    The file must be new; it is flushed to the disk, and the caller renames it into place.
    """
    header = _header(shapes, metadata)
    with create(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in in_order(shapes):
            tensor = fetch(name)
            if (tensor.dtype, tuple(tensor.shape)) != shapes[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {shapes[name]}")
            file.write(bytes_of_tensor(tensor))
            del tensor
        file.flush()
        os.fsync(file.fileno())


def stored_bytes(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """The length of the file that `stream_safetensors` writes, in bytes."""
    return 8 + len(_header(shapes, metadata)) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Writes `tensors` to `path`, which appears whole or not at all."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with written_whole(path) as made:
        stream_safetensors(made, shapes, fetch=tensors.__getitem__, metadata=metadata)


def save_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, which appears whole or not at all."""
    write_whole(path, text.encode("utf-8"))


def bytes_of_tensor(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def in_order(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The names in the order of a file: wide dtypes first, so that every tensor is aligned; then by name."""
    return sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))


def _header(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in in_order(shapes):
        dtype, shape = shapes[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)

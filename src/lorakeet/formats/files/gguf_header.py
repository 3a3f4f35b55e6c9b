"""Checks the header of a GGUF file against the file's size before anything trusts it.

    magic, version u32 │ tensors u64, keys u64 │ key: text, type u32, value │ tensor: text, n u32, n × u64, type u32, offset u64
    text: length u64, bytes │ array: type u32, count u64, values │ the tensors' bytes, from the next multiple of the alignment on

The package gguf makes objects of all that a header declares, down to the elements of arrays. It checks neither the end of the
file nor overlapping tensors. This check keeps one name at a time and 100 bytes a tensor.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.disk import open_buffered
from lorakeet.errors import DataError, PackageMissing, Problems, readable, require_regular

__all__ = ["MAGIC", "GgufHeader", "Slot", "begins_as_gguf", "check_gguf", "gguf_package"]

MAGIC = b"GGUF"
MOST_PARTS = 2_000_000  # keys, tensors and array elements; Gemma 4 has 1.3 million
PART_BYTES = 700  # of the package's objects for each of them
_TEXT, _ARRAY, _U32 = 8, 9, 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's types
_ALIGNMENT, _USUAL_ALIGNMENT = "general.alignment", 32
_MOST_DIMENSIONS = 4  # ggml's own limit
_LONGEST_NAME, _LONGEST_TEXT = 256, 1000  # bytes of a tensor's name; of a value that is kept


@dataclass(frozen=True)
class Slot:
    """A tensor's byte range in the file, and its shape with rows first."""

    kind: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header: the tensors by name, and all values that are single numbers or short texts."""

    tensors: Mapping[str, Slot]
    values: Mapping[str, int | float | str]
    parts: int = 0  # keys, tensors and array elements; the package gguf makes PART_BYTES of objects for each


def gguf_package() -> Any:
    """The package gguf; EnvironmentProblem if it is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise PackageMissing("GGUF files need the package gguf, which is not installed", "lorakeet[gguf]")
    import gguf

    return gguf


def begins_as_gguf(path: Path) -> bool:
    """True if the first bytes are those of a GGUF file; DataError if it cannot be read."""
    with readable(path), open_buffered(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def check_gguf(path: Path, *, most_parts: int = MOST_PARTS) -> GgufHeader:
    """Returns the checked header of `path`. DataError names the file and all that contradicts its content.

    `most_parts`: the allowed number of keys, tensors and array elements together.
    """
    gguf_package()
    require_regular(path)
    with readable(path):
        stat = path.stat()
        return _checked(path, stat.st_size, stat.st_mtime_ns, most_parts)


@functools.lru_cache(maxsize=8)
def _checked(path: Path, size: int, changed: int, most_parts: int) -> GgufHeader:
    """The header of the file with that size and modification time."""
    with open_buffered(path) as file:
        magic = file.read(4)
        if magic != MAGIC:
            raise DataError(f"{path} is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}. Fetch it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            read = _HeaderReader(data, most_parts)
            try:
                read.run()
            except _TooMany as error:
                raise DataError(f"{path} cannot be read: {error}. Use safetensors in its place.") from error
            except ValueError as error:
                where = f" at tensor {read.last!r}" if read.last else ""
                raise DataError(
                    f"{path} is not a whole GGUF file ({error}{where}). It may have been cut off; fetch it again."
                ) from error
    return GgufHeader(_byte_ranges(path, read, size), read.values, read.parts)


@dataclass(frozen=True)
class _Declared:
    """A tensor as the header declares it: dimensions with the row's width first, ggml's type number, offset of its bytes."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int


class _TooMany(ValueError):
    """A header longer than any known one, though the file is large enough for it."""


@dataclass
class _HeaderReader:
    """Reads the header and checks each length against the rest of the file; ValueError names what exceeds it."""

    data: mmap.mmap
    most_parts: int
    place: int = len(MAGIC)
    order: str = "<"
    parts: int = 0
    last: str = ""  # the present tensor
    keys: set[str] = field(default_factory=set)
    values: dict[str, int | float | str] = field(default_factory=dict)
    tensors: list[_Declared] = field(default_factory=list)

    def run(self) -> None:
        version = self._count("I")
        if version & 0xFFFF == 0:  # the other byte order
            self.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; readable are 2 and 3")
        tensors, keys = self._count("Q"), self._count("Q")
        self._declare(keys, 13, "keys")
        for _ in range(keys):
            self._key()
        self._declare(tensors, 24, "tensors")
        for _ in range(tensors):
            self.last = self._text()
            dimensions = self._count("I")
            self._require(8 * dimensions + 12)
            if len(self.last) > _LONGEST_NAME or not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise ValueError(f"it announces a tensor with {dimensions:,} dimensions and a name of {len(self.last):,} bytes")
            sizes = tuple(self._count("Q") for _ in range(dimensions))
            self.tensors.append(_Declared(self.last, sizes, self._count("I"), self._count("Q")))
        self.last = ""

    def _key(self) -> None:
        key, kind = self._text(), self._count("I")
        if key in self.keys:
            raise ValueError(f"its key {key!r} occurs twice")
        self.keys.add(key)
        value = self._value(kind, 0)
        if value is not None:
            self.values[key] = value
        if key == _ALIGNMENT and (kind != _U32 or not isinstance(value, int) or value < 1 or value & (value - 1)):
            raise ValueError(f"{_ALIGNMENT} is {value!r}; expected a power of two as u32")

    def _number(self, form: str) -> int | float:
        size = struct.calcsize(f"={form}")
        self._require(size)
        self.place += size
        found: int | float = struct.unpack_from(self.order + form, self.data, self.place - size)[0]
        return found

    def _count(self, form: str) -> int:
        return int(self._number(form))

    def _require(self, count: int) -> None:
        left = len(self.data) - self.place
        if count > left:
            raise ValueError(f"at byte {self.place:,} it announces {count:,} bytes, of which the file has {left:,}")

    def _declare(self, count: int, least: int, what: str) -> None:
        """Checks `count` things of at least `least` bytes against the rest of the file and against `most_parts`."""
        left = len(self.data) - self.place
        self.parts += count
        if count * least > left:
            raise ValueError(f"at byte {self.place:,} it announces {count:,} {what}, for which {left:,} bytes are too few")
        if self.parts > self.most_parts:
            raise _TooMany(
                f"its header announces {self.parts:,} keys, tensors and elements, and more than {self.most_parts:,} are not read"
            )

    def _text(self) -> str:
        size = self._count("Q")
        self._require(size)
        self.place += size
        kept = self.data[self.place - size : self.place - size + min(size, _LONGEST_TEXT)]
        return kept.decode("utf-8", "replace") if size <= _LONGEST_TEXT else kept.decode("utf-8", "replace") + "…"

    def _value(self, kind: int, depth: int) -> int | float | str | None:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY or depth >= 4:
            raise ValueError(f"at byte {self.place:,} there is a value of type {kind}, or arrays nested more than four deep")
        inner, count = self._count("I"), self._count("Q")
        each = struct.calcsize(f"={_NUMBERS[inner]}") if inner in _NUMBERS else 0
        self._declare(count, each or 8, "array elements")
        if each:
            self.place += count * each
            return None
        for _ in range(count):
            self._skip_text() if inner == _TEXT else self._value(inner, depth + 1)
        return None

    def _skip_text(self) -> None:
        size = self._count("Q")
        self._require(size)
        self.place += size


def _byte_ranges(path: Path, read: _HeaderReader, size: int) -> dict[str, Slot]:
    """The tensors with their byte ranges; DataError lists everything impossible about them."""
    advice = "Fetch the file again, or use the model's safetensors folder."
    about: Any = {"code": "file-malformed", "values": {"path": str(path)}}
    problems = Problems(f"{path} is not a sound GGUF file", DataError, remedy=advice, **about)
    alignment = int(read.values.get(_ALIGNMENT, _USUAL_ALIGNMENT))
    start = -(-read.place // alignment) * alignment
    kinds = {int(kind): (str(kind.name), *sizes) for kind, sizes in gguf_package().GGML_QUANT_SIZES.items()}
    slots: dict[str, Slot] = {}
    beyond: list[str] = []
    for tensor in read.tensors:
        found = _slot(tensor, kinds, start, alignment)
        if isinstance(found, str):
            problems.add(f"{path}: tensor {tensor.name!r} {found}")
        elif tensor.name in slots:
            problems.add(f"{path}: two tensors are called {tensor.name!r}.")
        else:
            slots[tensor.name] = found
            if found.end > size:
                beyond.append(tensor.name)
    if beyond:
        first, others = slots[beyond[0]], f", and so do {len(beyond) - 1:,} others" if beyond[1:] else ""
        problems.add(
            f"{path}: tensor {beyond[0]!r} ends at byte {first.end:,}, behind the end of the file at {size:,}{others}. "
            "It was probably cut off."
        )
    in_file = sorted(slots, key=lambda name: (slots[name].begin, slots[name].end))
    for name, after in itertools.pairwise(in_file):
        if slots[after].begin < slots[name].end:
            problems.add(f"{path}: tensor {after!r} begins inside {name!r}, at byte {slots[after].begin:,}.")
            break
    problems.raise_if_any()
    return slots


def _slot(tensor: _Declared, kinds: Mapping[int, tuple[str, int, int]], start: int, alignment: int) -> Slot | str:
    """The tensor's byte range, or what is wrong with it. `kinds`: name, numbers and bytes of a block, by ggml's number."""
    if tensor.kind not in kinds:
        return f"has the type {tensor.kind}, which is not known; readable are {', '.join(name for name, *_ in kinds.values())}."
    name, block, block_bytes = kinds[tensor.kind]
    shape = tuple(reversed(tensor.dimensions))
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        return f"has the shape {shape}; expected sizes of 1 or more and fewer than 2^63 numbers."
    if shape[-1] % block:
        return f"has rows of {shape[-1]:,} numbers, which are no whole number of {name} blocks of {block}."
    if tensor.offset % alignment:
        return f"begins at {tensor.offset:,}, which is no multiple of the alignment {alignment}."
    begin = start + tensor.offset
    return Slot(name, shape, begin, begin + math.prod(shape) // block * block_bytes)

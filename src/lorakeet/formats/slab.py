"""A safetensors file in one piece of memory: tensors are views, and the memory goes back when the last of them goes.

Serving loads adapters this way. A mapped file is there at once, but who cuts a mapped file short kills the process that reads it,
and who writes into it changes what is served. So only files that nobody else writes may be mapped. A copy keeps what the file had
and costs little more: the bytes are read once, into pages of 2 MiB where the system has them, since handing out memory 4 KiB at a
time takes several times as long as copying into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.errors import DataError
from lorakeet.formats.safe import SafeFile, open_safetensors

_AT_ONCE = getattr(mmap, "MAP_POPULATE", 0)  # Linux hands out all pages in one call
_LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)
_LARGE = 2 << 20  # bytes of such a page


@dataclass(frozen=True)
class Slab(SafeFile):
    """A checked file whose tensors lie in `data`, one mapping that ends with the last of its tensors."""

    data: mmap.mmap | None = None
    start: int = 0  # where in the file `data` begins
    numbers: int = 0  # where in the file the tensors begin

    def read(self, name: str) -> Tensor:
        """The tensor `name` as a view of the slab, in the dtype of the file."""
        stored = self.tensors[name]
        first, count = stored.begin - self.start, stored.end - stored.begin
        if self.data is None or not count:
            return torch.empty(stored.shape, dtype=stored.dtype)
        if first % stored.dtype.itemsize:  # some writers do not align: only then a copy
            return torch.frombuffer(bytearray(self.data[first : first + count]), dtype=stored.dtype).view(stored.shape)
        numbers = count // stored.dtype.itemsize
        return torch.frombuffer(self.data, dtype=stored.dtype, count=numbers, offset=first).view(stored.shape)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes and numbers: two files with one digest hold the same tensors."""
        found = hashlib.sha256()
        for name, stored in sorted(self.tensors.items()):
            found.update(f"{name} {stored.dtype} {stored.shape} {stored.begin - self.numbers}\n".encode())
        if self.data is not None:
            found.update(memoryview(self.data)[self.numbers - self.start :])
        return found.hexdigest()


@dataclass(frozen=True)
class Outline(SafeFile):
    """A checked file of which only the header is read: its tensors have shapes and dtypes, and no numbers."""

    finite: bool = True  # nothing to look at

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the meta device."""
        stored = self.tensors[name]
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def open_slab(path: Path, *, mapped: bool = False) -> Slab:
    """The whole file in memory, copied or `mapped`.

    DataError as in `open_safetensors`, and where the file changes while it is read.
    """
    file = open_safetensors(path)
    start = min((stored.begin for stored in file.tensors.values()), default=0)
    length = max((stored.end for stored in file.tensors.values()), default=0) - start
    if not length:
        return Slab(file.path, file.tensors, file.metadata)
    if mapped:
        with path.open("rb") as source:
            whole = mmap.mmap(source.fileno(), 0, flags=mmap.MAP_PRIVATE)  # private: writing to it would not reach the file
        return Slab(file.path, file.tensors, file.metadata, _finite(whole, file, start), whole, 0, start)
    data = _memory(length)
    with path.open("rb", buffering=0) as source:
        source.seek(start)
        view, done = memoryview(data), 0
        while done < length and (count := source.readinto(view[done:])):
            done += count
    view.release()
    if done != length:
        raise DataError(f"{path} became shorter while it was read. Fetch the file again.")
    return Slab(file.path, file.tensors, file.metadata, _finite(data, file, 0), data, start, start)


def _memory(length: int) -> mmap.mmap:
    """Memory to read a file into."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if _LARGE_PAGES is None or length < _LARGE:
        return mmap.mmap(-1, length, flags=flags | _AT_ONCE)
    data = mmap.mmap(-1, length, flags=flags)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        data.madvise(_LARGE_PAGES)
    return data


def open_outline(path: Path) -> Outline:
    """The header of the file, checked; DataError as in `open_safetensors`."""
    file = open_safetensors(path)
    return Outline(file.path, file.tensors, file.metadata)


def _finite(data: mmap.mmap, file: SafeFile, begin: int) -> bool:
    """Whether one sum shows that all numbers are finite; False means that each tensor has to be looked at."""
    dtypes = {stored.dtype for stored in file.tensors.values()}
    dtype = next(iter(dtypes))
    if len(dtypes) > 1 or not dtype.is_floating_point or dtype.itemsize == 1 or begin % dtype.itemsize:
        return False
    numbers = torch.frombuffer(data, dtype=dtype, count=(len(data) - begin) // dtype.itemsize, offset=begin)
    return bool(torch.isfinite(numbers.sum(dtype=torch.float32 if dtype.itemsize < 4 else dtype)))

"""A safetensors file in one piece of memory: tensors are views, and the memory is freed with the last of them.

Serving loads adapters this way. Mapping a file takes no time, but truncating it would kill the process that mapped it, and
writing to it would change what is served. So only files that no other program writes are mapped. A copy is safe and costs little
more: the bytes are read once, into pages of 2 MiB if the system has them, since allocating pages of 4 KiB takes several times as
long as copying into them.

Adapters of the same configuration have the same header, byte for byte, in files of the same length. The checked headers of the
last few are cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import weakref
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakeet.disk import open_regular
from lorakeet.errors import DataError, readable
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.formats.files.safetensors_file import DTYPE_NAMES, LARGEST_HEADER, Header, SafeFile, check_header, read_header

_AT_ONCE = getattr(mmap, "MAP_POPULATE", 0)  # Linux allocates all pages in one call
_LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)
_LARGE = 2 << 20  # bytes of such a page
MOST_HEADERS = 8
LONGEST_HEADER = 128 << 10  # bytes of one that is cached, which takes some ten times as many: 210 pairs have 50,000
LARGEST_SPARE = 64 << 20  # bytes
_SPARE: deque[mmap.mmap] = deque(maxlen=1)  # unused memory, for the next file
_HEADERS: LruCache[tuple[bytes, int], Header] = LruCache(MOST_HEADERS)  # by their bytes and the length of the file
_NAMED: LruCache[Header, hashlib._Hash] = LruCache(MOST_HEADERS)  # the hash of their entries, to be copied


@dataclass(frozen=True)
class LoadedFile(SafeFile):
    """A checked file in memory; `data` is freed with the last of its tensors."""

    data: NDArray[np.uint8] | None = None
    start: int = 0  # where in the file `data` begins
    tensors_at: int = 0  # where in the file the tensors begin

    def read(self, name: str) -> Tensor:
        """The tensor `name` as a view of `data`, in the dtype of the file."""
        stored = self.tensors[name]
        first, count = stored.begin - self.start, stored.end - stored.begin
        if self.data is None or not count:
            return torch.empty(stored.shape, dtype=stored.dtype)
        if first % stored.dtype.itemsize:  # unaligned, from some writers: a copy
            return torch.frombuffer(bytearray(self.data[first : first + count]), dtype=stored.dtype).view(stored.shape)
        numbers = count // stored.dtype.itemsize
        return torch.frombuffer(self.data, dtype=stored.dtype, count=numbers, offset=first).view(stored.shape)

    def rows(self, name: str) -> Tensor:
        """As `read`: the file, which may have changed, is not read again."""
        return self.read(name)

    def numbers(self) -> Tensor | None:
        """All numbers of the file in fp32, as a view of `data` if that is their dtype.

        None if there are several dtypes or a non-floating one, if a tensor is empty, or if the numbers are not aligned.
        """
        if self.data is None or self.header is None or self.header.has_empty:
            return None
        found = _all_numbers(self.data, self.header, self.header.start - self.start)
        return None if found is None else found.float()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes and numbers: two files with one digest hold the same tensors."""
        header = self.header
        start = self.tensors_at
        found = (_named(self, start) if header is None else _NAMED.get_or_make(header, lambda: _named(self, start))).copy()
        if self.data is not None:
            found.update(self.data[self.tensors_at - self.start :].data)
        return found.hexdigest()

    @cached_property
    def tensor_digests(self) -> dict[str, str]:
        """SHA-256 of each tensor's dtype, shape and bytes, as formats/identity takes it of a file."""
        found = {}
        for name, stored in sorted(self.tensors.items()):
            one = hashlib.sha256(f"{DTYPE_NAMES[stored.dtype]} {[*stored.shape]}".encode())
            if self.data is not None:
                one.update(self.data[stored.begin - self.start : stored.end - self.start].data)
            found[f"tensor {name}"] = one.hexdigest()
        return found


@dataclass(frozen=True)
class HeaderOnlyFile(SafeFile):
    """A checked file of which only the header is read; its tensors are meta tensors."""

    finite: bool = True  # no numbers to check

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the meta device."""
        stored = self.tensors[name]
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    def rows(self, name: str) -> Tensor:
        """As `read`."""
        return self.read(name)

    def numbers(self) -> Tensor | None:
        """As many, as a meta tensor."""
        if self.header is None or self.header.has_empty:
            return None
        return torch.empty(self.header.count, device="meta", dtype=torch.float32)


def load_safetensors(path: Path, *, mapped: bool = False, longest: int = LARGEST_HEADER) -> LoadedFile:
    """Loads the whole file, copied or `mapped`; its header is at most `longest` bytes long.

    DataError as in `open_safetensors`, and if the file becomes shorter while it is read.
    """
    with _opened(path) as file:
        header, known = _header(path, file, longest)
        length = header.size - header.start
        if not length:
            return LoadedFile(path, header.tensors, header.metadata, header=known)
        if mapped:  # privately: writing to it would not reach the file
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE), np.uint8)
            whole, start = len(data) == header.size, 0
        else:
            data = _memory(length)
            whole, start = _filled(path, file, data), header.start
    if not whole:
        raise DataError(f"{path} became shorter while it was read. Fetch the file again.")
    numbers = _all_numbers(data, header, header.start - start)
    finite = numbers is not None and math.isfinite(numbers.sum(dtype=torch.float32).item())  # else each tensor has to be checked
    return LoadedFile(path, header.tensors, header.metadata, finite, known, data, start, header.start)


def open_header(path: Path, *, longest: int = LARGEST_HEADER) -> HeaderOnlyFile:
    """Reads and checks the header of at most `longest` bytes; DataError as in `open_safetensors`."""
    with _opened(path) as file:
        header, known = _header(path, file, longest)
    return HeaderOnlyFile(path, header.tensors, header.metadata, header=known)


def _opened(path: Path) -> FileIO:
    with readable(path):
        return open_regular(path)


def _header(path: Path, file: FileIO, longest: int) -> tuple[Header, Header | None]:
    """The checked header, twice, the second None if it is too long to be cached; leaves `file` at the first tensor."""
    with readable(path):
        raw, size = read_header(path, file, longest)
    if len(raw) > LONGEST_HEADER:
        return check_header(path, raw, size), None
    header = _HEADERS.get_or_make((raw, size), lambda: check_header(path, raw, size))
    return header, header


def _filled(path: Path, file: FileIO, data: NDArray[np.uint8]) -> bool:
    """Reads the rest of the file into `data`; False if it is too short."""
    done = 0
    with data.data as view, readable(path):
        while done < len(view) and (count := file.readinto(view[done:])):
            done += count
        return done == len(view)


def _memory(length: int) -> NDArray[np.uint8]:
    """Allocates memory to read a file into. After the last tensor in it is freed, it is kept for a next file of that length."""
    data = _spare(length) or _new(length)
    array = np.frombuffer(data, np.uint8)
    if length <= LARGEST_SPARE:
        weakref.finalize(array, _SPARE.append, data).atexit = False
    return array


def _spare(length: int) -> mmap.mmap | None:
    """The spare memory if it has that length; otherwise it is freed."""
    try:
        data = _SPARE.pop()
    except IndexError:
        return None
    return data if len(data) == length else None


def free_spare_memory() -> None:
    """Frees the memory that is kept for the next file."""
    _SPARE.clear()


def _new(length: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if _LARGE_PAGES is None or length < _LARGE:
        return mmap.mmap(-1, length, flags=flags | _AT_ONCE)
    data = mmap.mmap(-1, length, flags=flags)
    with contextlib.suppress(OSError):  # a Linux built without them
        data.madvise(_LARGE_PAGES)
    return data


def _named(file: SafeFile, start: int) -> hashlib._Hash:
    """The hash of the names, dtypes, shapes and byte ranges of a file's tensors."""
    found = hashlib.sha256()
    for name, stored in sorted(file.tensors.items()):
        found.update(f"{name} {stored.dtype} {stored.shape} {stored.begin - start}\n".encode())
    return found


def _all_numbers(data: NDArray[np.uint8], header: Header, begin: int) -> Tensor | None:
    """The numbers of all tensors, from the byte `begin` of `data` on.

    None if there are several dtypes, a non-floating or 8-bit one, or if the numbers are not aligned.
    """
    dtype = header.dtype
    if dtype is None or not dtype.is_floating_point or dtype.itemsize == 1 or begin % dtype.itemsize:
        return None
    return torch.frombuffer(data, dtype=dtype, count=(len(data) - begin) // dtype.itemsize, offset=begin)

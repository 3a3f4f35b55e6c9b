"""Spills tensors and reads them again: in memory, in a scratch file, or from a GPU into host memory."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.core.tiled_product import RowSource
from lorakeet.errors import EnvironmentProblem
from lorakeet.memory.store import raw_bytes

OF_A_RUN = "Free some space there, or name another folder with memory.store. Checkpoints are as they were."


class Spill:
    """Keeps CPU tensors by key; with a `folder`, in a scratch file there that is deleted with the process.

    Raises EnvironmentProblem, which ends with `remedy`, if the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None, remedy: str = OF_A_RUN) -> None:
        self._remedy = remedy
        self._tensors: dict[Hashable, Tensor] = {}
        self._in_file: dict[Hashable, tuple[int, torch.dtype, tuple[int, ...]]] = {}  # offset, dtype, shape
        self._end = 0
        self._folder = folder
        try:
            self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
        except OSError as error:
            raise self._refused(error) from error
        self._closing = None if self._file is None else weakref.finalize(self, self._file.close)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Stores `tensor`, which must not be written to afterwards; EnvironmentProblem if the disk is full."""
        if self._file is None:
            self._tensors[key] = tensor
            return
        view = raw_bytes(tensor.contiguous())
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], self._end + done)
        except OSError as error:
            raise self._refused(error) from error
        self._in_file[key] = self._end, tensor.dtype, tuple(tensor.shape)
        self._end += len(view)

    def _refused(self, error: OSError) -> EnvironmentProblem:
        return EnvironmentProblem(f"The scratch file in {self._folder} cannot be written: {error.strerror}. {self._remedy}")

    def take(self, key: Hashable) -> Tensor:
        """Returns the tensor under `key` and drops it; without tensors, the file is overwritten from its start."""
        found = self.get(key)
        self.drop(key)
        return found

    def drop(self, key: Hashable) -> None:
        """Drops the tensor under `key`."""
        if self._file is None:
            del self._tensors[key]
            return
        del self._in_file[key]
        if not self._in_file:
            self._end = 0

    def get(self, key: Hashable) -> Tensor:
        """Returns the tensor under `key`, which stays stored; it must not be written to."""
        if self._file is None:
            return self._tensors[key]
        return self._read(*self._in_file[key])

    def rows(self, key: Hashable) -> RowSource:
        """Returns the matrix under `key`, from a file read some rows at a time; invalid once it is dropped."""
        return self._tensors[key] if self._file is None else _RowsInFile(self._read, *self._in_file[key])

    def _read(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        found = torch.empty(shape, dtype=dtype)
        view = raw_bytes(found)
        done = 0
        while self._file is not None and done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], begin + done)
        return found

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tensors or key in self._in_file

    def clear(self) -> None:
        """Drops all tensors."""
        self._tensors.clear()
        self._in_file.clear()
        self._end = 0

    def close(self) -> None:
        """Drops all tensors and closes the file."""
        self.clear()
        if self._closing is not None:
            self._closing()


@dataclass(frozen=True)
class _RowsInFile:
    """A matrix in a scratch file (core/tiled_product.RowSource)."""

    read: Callable[[int, torch.dtype, tuple[int, ...]], Tensor]
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self.read(self.begin + start * row, self.dtype, (max(0, stop - start), *self.shape[1:]))


class HostSpill(Spill):
    """Keeps tensors of a device in host memory and returns them on their device.

    Copies between a CUDA device and pinned memory run in stream order with the computation, without waiting. Not run on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._devices: dict[Hashable, torch.device] = {}

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Stores a copy of `tensor`."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self._tensors[key], self._devices[key] = copy.copy_(tensor, non_blocking=True), tensor.device

    def get(self, key: Hashable) -> Tensor:
        """Returns a copy on its device of the tensor under `key`, which stays stored."""
        return self._tensors[key].to(self._devices[key], non_blocking=True)

    def clear(self) -> None:
        super().clear()
        self._devices.clear()

    def take(self, key: Hashable) -> Tensor:
        """Returns a copy on its device of the tensor under `key` and drops it."""
        found = self.get(key)
        del self._tensors[key], self._devices[key]
        return found

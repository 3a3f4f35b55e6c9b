"""Tensors put aside in order and taken back: in memory, in a scratch file of their own, or off a GPU in the host's memory."""

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
    """Keeps CPU tensors by key until they are taken; with a `folder`, in a file there that vanishes with the process.

    EnvironmentProblem, which ends with `remedy`, where the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None, remedy: str = OF_A_RUN) -> None:
        self._remedy = remedy
        self._held: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._end = 0
        self._folder = folder
        try:
            self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
        except OSError as error:
            raise self._refused(error) from error
        self._closing = None if self._file is None else weakref.finalize(self, self._file.close)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps `tensor`, which must not be written to afterwards; EnvironmentProblem where the disk is full."""
        if self._file is None:
            self._held[key] = tensor
            return
        view = raw_bytes(tensor.contiguous())
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], self._end + done)
        except OSError as error:
            raise self._refused(error) from error
        self._places[key] = self._end, tensor.dtype, tuple(tensor.shape)
        self._end += len(view)

    def _refused(self, error: OSError) -> EnvironmentProblem:
        return EnvironmentProblem(f"The scratch file in {self._folder} cannot be written: {error.strerror}. {self._remedy}")

    def take(self, key: Hashable) -> Tensor:
        """The tensor kept under `key`, which is then forgotten; when all are taken, the file is empty again."""
        found = self.look(key)
        self.drop(key)
        return found

    def drop(self, key: Hashable) -> None:
        """Forgets the tensor kept under `key`."""
        if self._file is None:
            del self._held[key]
            return
        del self._places[key]
        if not self._places:
            self._end = 0

    def look(self, key: Hashable) -> Tensor:
        """The tensor kept under `key`, which stays; it must not be written to."""
        if self._file is None:
            return self._held[key]
        return self._read(*self._places[key])

    def rows(self, key: Hashable) -> RowSource:
        """The matrix kept under `key`, some of whose rows are read at a time where it is in a file; not after it was dropped."""
        return self._held[key] if self._file is None else _KeptRows(self._read, *self._places[key])

    def _read(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        found = torch.empty(shape, dtype=dtype)
        view = raw_bytes(found)
        done = 0
        while self._file is not None and done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], begin + done)
        return found

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._places

    def close(self) -> None:
        """Forgets everything."""
        self._held.clear()
        self._places.clear()
        if self._closing is not None:
            self._closing()


@dataclass(frozen=True)
class _KeptRows:
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
    """Keeps tensors of a device in the host's memory until they are taken, and then gives them back on their device.

    Copied by the device itself, between a CUDA device and pinned memory: what is computed before and after is in order with the
    copies, and nobody waits. Not run on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._devices: dict[Hashable, torch.device] = {}

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps a copy of `tensor`."""
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self._held[key], self._devices[key] = kept.copy_(tensor, non_blocking=True), tensor.device

    def look(self, key: Hashable) -> Tensor:
        """A copy on its device of the tensor kept under `key`, which stays."""
        return self._held[key].to(self._devices[key], non_blocking=True)

    def take(self, key: Hashable) -> Tensor:
        """A copy on its device of the tensor kept under `key`, which is then forgotten."""
        found = self.look(key)
        del self._held[key], self._devices[key]
        return found

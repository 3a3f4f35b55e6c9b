"""Spills tensors and reads them again: in memory, in a scratch file, or from a GPU into host memory."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.tiled_product import RowSource
from lorakeet.errors import EnvironmentProblem
from lorakeet.memory.store import raw_bytes
from lorakeet.memory.transfer import CudaTransfer

LEAVING = 2  # tensors that a device holds at most while they are copied from it
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

    def take(self, key: Hashable, then: Hashable | None = None) -> Tensor:
        """Returns the tensor under `key` and drops it; without tensors, the file is overwritten from its start.

        `then` is the key that is taken next, if it is known.
        """
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
    """Keeps tensors of a device in pinned host memory and returns them on their device, without one wait of the host.

        put     copying stream: wait until the tensor is computed → copy → event; it stays on the device until computing has
                waited for that event, which it does when LEAVING others were put after it
        take    copying stream: copy back → event; computing stream: wait for that event. The one that is taken next is on its way

    Copies are those of `transfer`, the blocks' own. Not run on a GPU.
    """

    def __init__(self, transfer: CudaTransfer) -> None:
        super().__init__()
        self._transfer = transfer
        self._leaving: deque[tuple[Tensor, Any]] = deque()  # on the device, each with the event of its copy
        self._arriving: dict[Hashable, tuple[Tensor, Any]] = {}

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Stores a copy of `tensor`, which must not be written to while LEAVING others are put."""
        self._forget_leaving(LEAVING - 1)
        self._tensors[key], copied = self._transfer.to_host(tensor)
        self._leaving.append((tensor, copied))

    def get(self, key: Hashable) -> Tensor:
        """Returns a copy on its device of the tensor under `key`, which stays stored."""
        there = key in self._arriving
        found, copied = self._arriving.pop(key) if there else self._transfer.to_device(self._tensors[key])
        self._transfer.compute_after(copied)
        return found

    def take(self, key: Hashable, then: Hashable | None = None) -> Tensor:
        """Returns a copy on its device of the tensor under `key` and drops it; that of `then` begins to be copied."""
        self._forget_leaving(0)
        found = super().take(key)
        if then in self._tensors and then not in self._arriving:
            self._arriving[then] = self._transfer.to_device(self._tensors[then])
        return found

    def drop(self, key: Hashable) -> None:
        super().drop(key)
        self._forget_arriving(key)

    def clear(self) -> None:
        self._forget_leaving(0)
        for key in list(self._arriving):
            self._forget_arriving(key)
        super().clear()

    def _forget_arriving(self, key: Hashable) -> None:
        """Lets computing wait for a copy that no one takes: its memory is computing's own again only once the copy is over."""
        if key in self._arriving:
            _, copied = self._arriving.pop(key)
            self._transfer.compute_after(copied)

    def _forget_leaving(self, most: int) -> None:
        """Lets computing wait for copies until at most so many tensors stay for them."""
        while len(self._leaving) > most:
            _, copied = self._leaving.popleft()
            self._transfer.compute_after(copied)

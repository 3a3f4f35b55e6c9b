"""Store and scratch file of a rehearsal: they keep shapes alone, and reading returns tensors without numbers.

Within a memory.ledger.Ledger, tensors that are read count as they would from the files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakeet.core.tiled_product import RowSource
from lorakeet.memory.spill import LEAVING, Spill
from lorakeet.memory.store import CPU, LINE, StoredRows, TensorLocation, WeightStore


class ShapeStore(WeightStore):
    """Records of the given tensors, by the record's name and the tensor's, with the layout of a real store."""

    def __init__(self, records: Mapping[str, Mapping[str, Tensor]], identity: Mapping[str, str]) -> None:
        self.identity, self.tensors = dict(identity), {}
        at = 0
        for record, tensors in records.items():
            for name, tensor in tensors.items():
                at += -at % LINE
                self.tensors[f"{record}.{name}"] = TensorLocation(tensor.dtype, tuple(tensor.shape), at, at + tensor.nbytes)
                at += tensor.nbytes

    def rows(self, name: str, device: torch.device = CPU) -> StoredRows:
        return ShapeRows(self, name, device)

    def read(self, begin: int, into: Tensor) -> None:
        """Leaves `into` as it is."""

    def close(self) -> None:
        """Does nothing: there is no file."""


class ShapeRows(StoredRows):
    """Rows without numbers. The ids are unknown and counted as all different."""

    def lookup(self, ids: Tensor) -> Tensor:
        found = torch.empty((min(ids.numel(), self.shape[0]), self.shape[1]), dtype=self.dtype)
        return nn.functional.embedding(torch.zeros_like(ids), found)


@dataclass(frozen=True)
class _ShapeMatrix:
    """A matrix without numbers, read some rows at a time (core/tiled_product.RowSource)."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self.shape[0])
        return torch.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)


class ShapeSpill(Spill):
    """A Spill that keeps only the shapes of its tensors; with `copied` also what is on a device for its copies (HostSpill)."""

    def __init__(self, *, copied: bool = False) -> None:
        super().__init__()
        self._shapes: dict[Hashable, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._leaving: deque[Tensor] = deque(maxlen=LEAVING if copied else 0)
        self._copied, self._arriving = copied, dict[Hashable, Tensor]()

    def put(self, key: Hashable, tensor: Tensor) -> None:
        self._shapes[key] = tensor.dtype, tuple(tensor.shape)
        self._leaving.append(tensor)

    def take(self, key: Hashable, then: Hashable | None = None) -> Tensor:
        self._leaving.clear()
        found = super().take(key)
        if self._copied and then in self._shapes:
            self._arriving[then] = self.get(then)
        return found

    def drop(self, key: Hashable) -> None:
        del self._shapes[key]
        self._arriving.pop(key, None)

    def rows(self, key: Hashable) -> RowSource:
        return _ShapeMatrix(*self._shapes[key])

    def get(self, key: Hashable) -> Tensor:
        dtype, shape = self._shapes[key]
        return self._arriving[key] if key in self._arriving else torch.empty(shape, dtype=dtype)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._shapes

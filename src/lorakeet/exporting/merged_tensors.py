"""The tensors of a model folder with an adapter merged in, computed one at a time, and how much of it an exported file holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter
from lorakeet.core.tiled_product import PART, RowSource, as_matrix, parts
from lorakeet.merging.checkpoint import Checkpoint, open_checkpoint
from lorakeet.merging.edits import Edit, Edits, edits_for

PART_BYTES = 48 * PART  # peak while two tensors are compared, or one is written, in parts (asserted by tests)


class MergedTensors:
    """The tensors of a base with an adapter merged in. One tensor at a time is computed, in fp32.

    They have their names on disk; a subclass may have others (`home`), and another layout (`conversion`).
    """

    def __init__(self, source: Path, adapter: Adapter | None) -> None:
        """ConfigError lists every tensor of the adapter that does not fit the model in `source`."""
        self.checkpoint: Checkpoint = open_checkpoint(source)
        self.edits = Edits({}, {}, ()) if adapter is None else edits_for(self.checkpoint, adapter)
        self.home = {name: name for name in [*self.checkpoint.home, *self.edits.by_name]}  # those that the adapter adds last

    def conversion(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What the merged tensor goes through; None if it stays as it is."""
        return None

    def _edit(self, name: str) -> Edit:
        """The edit of the tensor, one without steps if the adapter does not change it."""
        on_disk = self.home[name]
        return self.edits.by_name.get(on_disk) or Edit(on_disk, self.checkpoint.stored(on_disk).shape)

    @property
    def names(self) -> list[str]:
        """Every tensor."""
        return list(self.home)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor with the adapter merged in."""
        return self._edit(name).shape

    def changes(self, name: str) -> bool:
        """True if the adapter changes numbers of the tensor."""
        return bool(self._edit(name).steps)

    @torch.no_grad()
    def fetch(self, name: str, *, folded: bool = True) -> Tensor:
        """The tensor in fp32; without `folded`, that of the base."""
        edit, convert = self._edit(name), self.conversion(name)
        tensor = self.checkpoint.read(edit.source).float()
        for step in edit.steps if folded else ():
            tensor = step(tensor)
        return tensor if convert is None else convert(tensor)

    def rows(self, name: str) -> RowSource:
        """As `fetch`, readable in parts if the tensor is neither changed nor converted."""
        if self.changes(name) or self.conversion(name) is not None:
            return self.fetch(name)
        source = self._edit(name).source
        return Fp32Rows(self.checkpoint.shards[self.checkpoint.home[source]].rows(source))


@dataclass(frozen=True)
class Fp32Rows:
    """Rows in another dtype, read as fp32."""

    stored: RowSource

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def as_matrix(self) -> Fp32Rows:
        """The tensor as a matrix, all dimensions but the last flattened to rows (core/tiled_product.StackedRows)."""
        return Fp32Rows(as_matrix(self.stored))

    def __getitem__(self, part: slice) -> Tensor:
        return self.stored[part].float()


class Expected(Protocol):
    """The expected tensors by name, such as `MergedTensors`."""

    @property
    def names(self) -> list[str]: ...

    def changes(self, name: str) -> bool: ...

    def fetch(self, name: str, *, folded: bool = True) -> Tensor: ...

    def rows(self, name: str) -> RowSource: ...


@dataclass(frozen=True)
class StoredTensor:
    """How a stored tensor differs from the expected one, W + Δ.

    share: ⟨stored − W, Δ⟩ / ⟨Δ, Δ⟩: 1 if the whole change is there, 0 if none is, c if it was scaled by c; NaN if Δ = 0.
    Rounding to a few bits is nearly independent of Δ, so `share` is meaningful even if rounding is larger than the change;
    rounding alone changes it by about `share_error`, ‖stored − W − Δ‖ / (‖Δ‖·√n).
    rounding: ‖stored − (W + Δ)‖ / ‖W + Δ‖. moved: ‖stored − W‖ / ‖Δ‖, large if another adapter was merged.
    noise: ‖stored − (W + Δ)‖ / ‖Δ‖; above 1 rounding is larger than the change. If W itself is on the grid of a few bits,
    rounding removes the change instead of adding noise to it.
    """

    share: float
    share_error: float
    rounding: float
    moved: float
    noise: float = 0.0


def compare_stored(expected: Expected, stored: Iterable[tuple[str, RowSource]]) -> dict[str, StoredTensor]:
    """Compares every tensor of `expected` with the stored one; a missing one or another shape gives infinite differences.

    Tensors that the adapter changes are computed whole, with and without the change; others are read in parts.
    """
    lost = StoredTensor(0.0, 0.0, math.inf, 0.0)
    found = dict.fromkeys(expected.names, lost)
    for name, tensor in stored:
        if name in found:
            base = expected.fetch(name, folded=False) if expected.changes(name) else None
            found[name] = _compare(base, expected.rows(name), tensor)
    return found


def _compare(base: RowSource | None, wanted: RowSource, stored: RowSource) -> StoredTensor:
    """Compares in parts, in fp64; `base` is None if the adapter changes nothing."""
    shape = tuple(wanted.shape)
    if tuple(stored.shape) != shape:
        return StoredTensor(0.0, 0.0, math.inf, 0.0)
    if base is not None and tuple(base.shape) != shape:
        base = None
    if isinstance(base, Tensor) and isinstance(wanted, Tensor) and torch.equal(base, wanted):
        base = None
    wanted, stored, base = as_matrix(wanted), as_matrix(stored), None if base is None else as_matrix(base)
    error = size = change = moved = both = 0.0  # sums of squares; the last of products
    for part in parts(tuple(wanted.shape)) if shape else [...]:
        right, given = wanted[part].double(), stored[part].double()  # type: ignore[index]
        error, size = error + _squares(given - right), size + _squares(right)
        if base is not None:
            before = base[part].double()  # type: ignore[index]
            change, moved = change + _squares(right - before), moved + _squares(given - before)
            both += float(((given - before) * (right - before)).sum())
    rounding = math.sqrt(error) / max(math.sqrt(size), 1e-30)
    if base is None:
        return StoredTensor(math.nan, 0.0, rounding, 0.0)
    noise = math.sqrt(error / change)
    return StoredTensor(both / change, noise / math.sqrt(math.prod(shape)), rounding, math.sqrt(moved / change), noise)


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())

"""The tensors of a model folder with an adapter folded in, made one by one, and how much of the change a file holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter
from lorakeet.core.tiled_product import PART, RowSource, as_matrix, parts
from lorakeet.merge.checkpoint import Checkpoint, open_checkpoint
from lorakeet.merge.edits import Edits, edits_for

PART_BYTES = 48 * PART  # the most held while two tensors are compared, or one is written, a part at a time (tests count it)


class Folded:
    """A base and the changes of an adapter, by the names of the tensors on disk. One tensor is made at a time, in fp32."""

    def __init__(self, source: Path, adapter: Adapter | None) -> None:
        """ConfigError lists every tensor of the adapter that does not fit the model in `source`."""
        self.checkpoint: Checkpoint = open_checkpoint(source)
        self.edits = Edits({}, {}, ()) if adapter is None else edits_for(self.checkpoint, adapter)

    @property
    def names(self) -> list[str]:
        """Every tensor, those that the adapter adds last."""
        return list(dict.fromkeys([*self.checkpoint.home, *self.edits.by_name]))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor once the adapter is folded in."""
        edit = self.edits.by_name.get(name)
        return edit.shape if edit else self.checkpoint.stored(name).shape

    def changes(self, name: str) -> bool:
        """Whether the adapter makes other numbers of the tensor."""
        edit = self.edits.by_name.get(name)
        return edit is not None and bool(edit.steps)

    @torch.no_grad()
    def fetch(self, name: str, *, folded: bool = True) -> Tensor:
        """The tensor in fp32; without `folded` as it is in the base."""
        edit = self.edits.by_name.get(name)
        source = edit.source if edit else name
        tensor = self.checkpoint.shards[self.checkpoint.home[source]].read(source).float()
        for step in edit.steps if edit and folded else ():
            tensor = step(tensor)
        return tensor


    def rows(self, name: str) -> RowSource:
        """The tensor with the adapter folded in, in fp32: read in parts where the adapter leaves it alone, else whole."""
        if self.changes(name):
            return self.fetch(name)
        edit = self.edits.by_name.get(name)
        source = edit.source if edit else name
        return InFp32(self.checkpoint.shards[self.checkpoint.home[source]].rows(source))


@dataclass(frozen=True)
class InFp32:
    """Rows in another dtype, read as fp32."""

    stored: RowSource

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def as_matrix(self) -> InFp32:
        """With all dimensions but the last laid end to end as rows (core/tiled_product.StackedRows)."""
        return InFp32(as_matrix(self.stored))

    def __getitem__(self, part: slice) -> Tensor:
        return self.stored[part].float()


class Expected(Protocol):
    """What tensors should be, by name: `Folded`, or a layout of it under other names."""

    @property
    def names(self) -> list[str]: ...

    def changes(self, name: str) -> bool: ...

    def fetch(self, name: str, *, folded: bool = True) -> Tensor: ...

    def rows(self, name: str) -> RowSource: ...


@dataclass(frozen=True)
class StoredTensor:
    """How one stored tensor relates to what it should be, W + Δ.

    share: ⟨stored − W, Δ⟩ / ⟨Δ, Δ⟩: 1 when the whole change is there, 0 when none is, c when it was scaled by c; NaN where Δ = 0.
    Rounding to a few bits is nearly independent of Δ, so `share` stays readable where rounding is larger than the change;
    `share_error` is how far rounding alone moves it, ‖stored − W − Δ‖ / (‖Δ‖·√n).
    rounding: ‖stored − (W + Δ)‖ / ‖W + Δ‖. moved: ‖stored − W‖ / ‖Δ‖, large where another adapter was folded in.
    noise: ‖stored − (W + Δ)‖ / ‖Δ‖; above 1 the rounding is larger than the change, and where W itself lies on the grid of the
    few bits it swallows the change instead of adding noise to it.
    """

    share: float
    share_error: float
    rounding: float
    moved: float
    noise: float = 0.0


def compare_stored(expected: Expected, stored: Iterable[tuple[str, RowSource]]) -> dict[str, StoredTensor]:
    """Every tensor of `expected` against the stored one of its name; infinite differences where one is missing or misshapen.

    What the adapter changes is made whole, with and without the change; all else is read in parts.
    """
    lost = StoredTensor(0.0, 0.0, math.inf, 0.0)
    found = dict.fromkeys(expected.names, lost)
    for name, tensor in stored:
        if name in found:
            base = expected.fetch(name, folded=False) if expected.changes(name) else None
            found[name] = _compare(base, expected.rows(name), tensor)
    return found


def _compare(base: RowSource | None, wanted: RowSource, stored: RowSource) -> StoredTensor:
    """In parts, in fp64; `base` is None where the adapter changes nothing."""
    shape = tuple(wanted.shape)
    if tuple(stored.shape) != shape:
        return StoredTensor(0.0, 0.0, math.inf, 0.0)
    if base is not None and (tuple(base.shape) != shape or _equal(base, wanted)):
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


def _equal(one: RowSource, other: RowSource) -> bool:
    """Whether both are in memory, and the same."""
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())

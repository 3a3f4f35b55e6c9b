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
from lorakeet.core.tiled_product import PART, RowSource, as_matrix, matrix_shape, parts
from lorakeet.merging.checkpoint import Checkpoint, open_checkpoint
from lorakeet.merging.edits import Edit, Edits, edits_for

PART_BYTES = 48 * PART  # peak while two tensors are compared, or one is written, in parts (asserted by tests)


Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """What a written tensor is made of: a tensor of the folder, or several that are stacked, such as the matrices of experts.

    `convert` is what each goes through, merged. `by_matrix`: the source is itself a stack, whose matrices go through it alone.
    """

    sources: tuple[str, ...]
    convert: Convert | None = None
    stacked: bool = False
    by_matrix: bool = False


class MergedTensors:
    """The tensors of a base with an adapter merged in. One tensor at a time is computed, in fp32; of a stack, one matrix.

    They have their names on disk; a subclass may have others, made of one or several of those (`home`).
    """

    def __init__(self, source: Path, adapter: Adapter | None) -> None:
        """ConfigError lists every tensor of the adapter that does not fit the model in `source`."""
        self.checkpoint: Checkpoint = open_checkpoint(source)
        self.edits = Edits({}, {}, ()) if adapter is None else edits_for(self.checkpoint, adapter)
        every = dict.fromkeys([*self.checkpoint.home, *self.edits.by_name])  # those that the adapter adds last
        self.home = {name: Part((name,)) for name in every}

    def _edit(self, source: str) -> Edit:
        """The edit of a tensor of the folder, one without steps if the adapter does not change it."""
        return self.edits.by_name.get(source) or Edit(source, self.checkpoint.stored(source).shape)

    @property
    def names(self) -> list[str]:
        """Every tensor."""
        return list(self.home)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor with the adapter merged in."""
        part = self.home[name]
        shape = self._edit(part.sources[0]).shape
        if part.convert is not None:
            shape = tuple(part.convert(torch.empty(shape, device="meta")).shape)
        return (len(part.sources), *shape) if part.stacked else shape

    def changes(self, name: str) -> bool:
        """True if the adapter changes numbers of the tensor."""
        return any(self._edit(source).steps for source in self.home[name].sources)

    def rows(self, name: str, *, folded: bool = True) -> RowSource:
        """The tensor in fp32, without `folded` that of the base: its numbers, or rows that are read or computed in parts.

        It is read in parts if it is neither changed nor converted, and computed by matrices if it is a stack.
        """
        part = self.home[name]
        if part.stacked:
            return Stack(self.shape(name), lambda number: self._one(part.sources[number], part.convert, folded))
        edit, convert = self._edit(part.sources[0]), part.convert
        stored = Fp32Rows(self.checkpoint.shards[self.checkpoint.home[edit.source]].rows(edit.source))
        if convert is not None and part.by_matrix and not edit.steps:
            return Stack(self.shape(name), lambda number: convert(stored[number : number + 1][0]).contiguous())
        if edit.steps or convert is not None:
            return self._one(part.sources[0], convert, folded)
        return stored

    def whole(self, name: str) -> int:
        """The numbers of the largest tensor of the folder that is computed whole for this one; 0 if it is read in parts."""
        part = self.home[name]
        edits = [self._edit(source) for source in part.sources]
        if (part.convert is None and not part.stacked) or part.by_matrix:
            edits = [edit for edit in edits if edit.steps]
        return max((math.prod(edit.shape) for edit in edits), default=0)

    @torch.no_grad()
    def _one(self, source: str, convert: Convert | None, folded: bool) -> Tensor:
        edit = self._edit(source)
        tensor = self.checkpoint.read(edit.source).float()
        for step in edit.steps if folded else ():
            tensor = step(tensor)
        return tensor if convert is None else convert(tensor).contiguous()


class Stack:
    """Matrices of one shape, (n, rows, columns) in fp32; each is computed when it is read, and the last is kept."""

    dtype = torch.float32

    def __init__(self, shape: tuple[int, ...], matrix: Callable[[int], Tensor]) -> None:
        self.shape = shape
        self._matrix = matrix
        self._last: tuple[int, Tensor] | None = None

    def __getitem__(self, part: slice) -> Tensor:
        """Some of the matrices, (n, rows, columns)."""
        return torch.stack([self.matrix(number) for number in range(*part.indices(self.shape[0]))])

    def as_matrix(self) -> RowsOfStack:
        """The matrices under each other, (n · rows, columns)."""
        return RowsOfStack(self)

    def matrix(self, number: int) -> Tensor:
        """One of the matrices, (rows, columns)."""
        if self._last is None or self._last[0] != number:
            self._last = None
            self._last = number, self._matrix(number)
        return self._last[1]


@dataclass(frozen=True)
class RowsOfStack:
    """The rows of a stack of matrices, counted through."""

    stack: Stack
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return matrix_shape(self.stack.shape)

    def __getitem__(self, part: slice) -> Tensor:
        """(rows, columns)."""
        height = self.stack.shape[-2]
        start, stop, _ = part.indices(self.shape[0])
        found = []
        while start < stop:
            number, first = divmod(start, height)
            count = min(height - first, stop - start)
            found.append(self.stack.matrix(number)[first : first + count])
            start += count
        return torch.cat(found) if len(found) != 1 else found[0]


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
        """The tensor as a matrix, all dimensions but the last flattened to rows (core/tiled_product.RowsOfStack)."""
        return Fp32Rows(as_matrix(self.stored))

    def __getitem__(self, part: slice) -> Tensor:
        return self.stored[part].float()


class Expected(Protocol):
    """The expected tensors by name, such as `MergedTensors`."""

    @property
    def names(self) -> list[str]: ...

    def changes(self, name: str) -> bool: ...

    def rows(self, name: str, *, folded: bool = True) -> RowSource: ...


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
            base = expected.rows(name, folded=False) if expected.changes(name) else None
            found[name] = _compare(base, expected.rows(name), tensor)
    return found


def _compare(base: RowSource | None, wanted: RowSource, stored: RowSource) -> StoredTensor:
    """Compares in parts, in fp64; `base` is None if the adapter changes nothing."""
    shape = tuple(wanted.shape)
    if tuple(stored.shape) != shape:
        return StoredTensor(0.0, 0.0, math.inf, 0.0)
    if base is not None and tuple(base.shape) != shape:
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
    if base is None or not change:
        return StoredTensor(math.nan, 0.0, rounding, 0.0)
    noise = math.sqrt(error / change)
    return StoredTensor(both / change, noise / math.sqrt(math.prod(shape)), rounding, math.sqrt(moved / change), noise)


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())

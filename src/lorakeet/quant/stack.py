"""Stacked matrices that are packed one by one, such as those of experts: in place of a parameter (count, out, in).

    buffers of one matrix       packed (n,)         absmax (b,)         …
    of the stack                packed (count, n)   absmax (count, b)   …       matrix e: the views [e]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.quant.packed import PackedBase


class PackedStack(nn.Module):
    """Indexed by a number, as the parameter was, it gives that matrix dequantised: transformers' own code of experts runs on it.

    `transposed`: the parameter was (count, in, out), and so is what an index gives; the packed matrices are (out, in).
    """

    _one: PackedBase  # without its buffers, and no submodule: it stands for any matrix

    def __init__(self, one: PackedBase, count: int) -> None:
        """`count` matrices of zeros, packed as `one` is."""
        super().__init__()
        self.count, self.transposed = count, False
        self._is_hf_initialized = True  # transformers would draw numbers for it
        vars(self)["_one"] = _emptied(one)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                self.register_buffer(name, torch.zeros((count, *buffer.shape), dtype=buffer.dtype, device=buffer.device))
        self.register_buffer("like", torch.empty(0, device=one.device), persistent=False)  # of the dtype of dequantised matrices

    @classmethod
    def of(cls, bases: Iterable[PackedBase]) -> PackedStack:
        """Packed matrices of one shape and one packing, stacked. ValueError if they differ."""
        held = list(bases)
        first = held[0]
        if any(base.settings != first.settings for base in held):
            raise ValueError("the matrices of a stack are packed in different ways")
        found = cls(first, len(held))
        for name, stacked in found._stacked():
            torch.stack([getattr(base, name) for base in held], out=stacked)
        return found

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """The matrix of this number, (out, in) or if `transposed` (in, out), as a new tensor."""
        base = self.matrix(int(index))
        dense = base.unpack(torch.empty(base.shape, dtype=self.dtype, device=base.device))
        return dense.t() if self.transposed else dense

    def matrix(self, index: int) -> PackedBase:
        """The packed matrix of this number, whose buffers are views."""
        found = copy.copy(self._one)
        views = {name: stacked[index] for name, stacked in self._stacked()}
        vars(found)["_buffers"] = {name: views.get(name) for name in self._one._buffers}
        return found

    def dense(self) -> Tensor:
        """All matrices dequantised, (count, out, in) in fp32."""
        return torch.stack([self.matrix(index).dense() for index in range(self.count)])

    def stand_for(self, parameter: Tensor, *, transposed: bool) -> None:
        """Takes the dtype and the orientation of the parameter whose place it takes."""
        self.transposed = transposed
        self.like = torch.empty(0, dtype=parameter.dtype, device=self.device)

    def outline(self, one: PackedBase) -> PackedStack:
        """The same buffers, of matrices that are unpacked as `one` is (models/text/from_config.ShapeBase)."""
        found = copy.copy(self)
        vars(found)["_one"] = _emptied(one)
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the packed matrices, (count, out, in)."""
        return (self.count, *self._one.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of dequantised matrices."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where its buffers are."""
        return next(stacked.device for _, stacked in self._stacked())

    @property
    def bytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(stacked.nbytes for _, stacked in self._stacked())

    @property
    def settings(self) -> dict[str, Any]:
        """Those of one matrix, with the shape of the stack."""
        return {**self._one.settings, "shape": list(self.shape)}

    def _stacked(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in self._one._buffers.items():
            if buffer is not None:
                yield name, getattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedStack:
        """Moves the buffers; a cast changes the dtype of dequantised matrices alone."""

        def moved(buffer: Tensor) -> Tensor:
            applied = fn(buffer)
            return applied if applied.dtype == buffer.dtype or buffer is like else buffer.to(applied.device)

        like = self.like
        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        return f"shape={self.shape}, transposed={self.transposed}"


def _emptied(base: PackedBase) -> PackedBase:
    """The base with empty buffers."""
    found = copy.copy(base)
    vars(found)["_buffers"] = {name: None if held is None else torch.empty(0) for name, held in base._buffers.items()}
    return found

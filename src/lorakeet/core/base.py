"""Frozen bases: a weight that is never trained, behind four methods.

A base answers `matmul(x)` = x·Wᵀ, `matmul_t(g)` = g·W, `dense()` = W, and `store(weight)`, which writes a new W into it.
Quantised bases (folder `quant`) answer the same four, so that one autograd function works for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lorakeet.kernels.choose import dense_products
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.int8_rows import MOST
from lorakeet.kernels.cpu.stored import DENSE, INT8_ROWS, StoredWeight
from lorakeet.kernels.device import is_cpu
from lorakeet.kernels.protocol import Int8Products


class FrozenBase(Protocol):
    """A frozen weight W of shape (out, in), however it is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def matmul(self, x: Tensor) -> Tensor:
        """x (tokens, in) to x·Wᵀ (tokens, out), in the dtype of x, to which W is cast or dequantised for the product."""

    def matmul_t(self, grad: Tensor) -> Tensor:
        """grad (tokens, out) to grad·W (tokens, in), in the dtype of grad."""

    def dense(self) -> Tensor:
        """W as a plain (out, in) tensor; do not write into it."""

    def store(self, weight: Tensor) -> None:
        """Replaces W by `weight` (out, in), rounded as this base stores it."""


class FrozenStack(Protocol):
    """Frozen matrices (count, out, in) that are no tensor: those of experts, packed."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(count, out, in)."""

    def __len__(self) -> int:
        """How many matrices there are."""

    def matrix(self, index: int) -> FrozenBase:
        """The matrix of this number."""


class QuantisedRows(NamedTuple):
    """Rows quantised to int8 (tokens, width), the step of each row (tokens, 1), and the dtype that they had.

    The outlier `columns` (count,), if any, are zeros in the codes; their values are `apart` (tokens, count). `kernel` made the
    codes; None: torch.
    """

    codes: Tensor
    steps: Tensor
    dtype: torch.dtype
    columns: Tensor | None = None
    apart: Tensor | None = None
    kernel: Int8Products | None = None


@runtime_checkable
class Int8Multiplier(Protocol):
    """A base that may multiply quantised rows (quant/int8). Rows are quantised in the same way for every such base."""

    def runs_in_int8(self, x: Tensor) -> bool:
        """True if a product with x runs in int8 now."""

    def quantise(self, x: Tensor) -> QuantisedRows:
        """Quantises x (tokens, in)."""

    def matmul_int8(self, rows: QuantisedRows) -> Tensor:
        """The result of `matmul` for the quantised x."""


def matmul_each(bases: Sequence[FrozenBase], x: Tensor) -> list[Tensor]:
    """x·Wᵀ of several bases with the same input x, which is quantised once for all products in int8."""
    rows: QuantisedRows | None = None
    found = []
    for base in bases:
        if multiplies_int8(base, x):
            in_int8 = cast(Int8Multiplier, base)
            rows = rows or in_int8.quantise(x)
            found.append(in_int8.matmul_int8(rows))
        else:
            found.append(base.matmul(x))
    return found


@runtime_checkable
class AddingBase(Protocol):
    """A base whose product can be added to a sum and rounded once, where C multiplies."""

    def add_matmul_t(self, to: Tensor, grad: Tensor) -> None:
        """Adds grad·W to `to` (tokens, in), in place."""


@runtime_checkable
class StoredBase(Protocol):
    """A base that C can read as it is stored."""

    def stored(self) -> StoredWeight | None:
        """The weight as C reads it; None if C cannot read it."""

    def tensors(self) -> Sequence[Tensor]:
        """The tensors in which it is stored."""


def _is(base: FrozenBase, protocol: type) -> bool:
    return _keeps(type(base), protocol)


@functools.cache  # checking a protocol takes longer than a small product
def _keeps(kind: type, protocol: type) -> bool:
    return issubclass(kind, protocol)


def multiplies_int8(base: FrozenBase, x: Tensor) -> bool:
    """True if a product of the base with x runs in int8 now."""
    return _is(base, Int8Multiplier) and cast(Int8Multiplier, base).runs_in_int8(x)


def stored_weight(base: FrozenBase, x: Tensor) -> StoredWeight | None:
    """The weight that C multiplies with bf16 rows such as x; None if the base multiplies itself."""
    if not _is(base, StoredBase):
        return None
    found = cast(StoredBase, base).stored()
    if found is None or not multiplies_int8(base, x):
        return found
    return found._replace(kind=INT8_ROWS) if max(found.out, found.width) <= MOST else None


def sum_of_matmul_t(bases: Sequence[FrozenBase], grads: Sequence[Tensor]) -> Tensor:
    """Σ g·W (tokens, in) of bases with the same input, from the gradient (tokens, out) of each output.

    Where C multiplies, dense and packed bases round each product with the sum; else each product is rounded first.
    """
    found: Tensor | None = None
    for base, grad in zip(bases, grads, strict=True):
        if found is None:
            found = base.matmul_t(grad)
        elif _is(base, AddingBase):
            cast(AddingBase, base).add_matmul_t(found, grad)
        else:
            found.add_(base.matmul_t(grad))
    assert found is not None
    return found


def frozen_product(x: Tensor, weight: Tensor, *, across: bool = False) -> Tensor:
    """x·Wᵀ, or x·W if `across`, of x (tokens, ·) and a frozen W (out, in), which is cast to the dtype of x."""
    weight = weight.to(x.dtype)
    if (kernel := dense_products(x, weight)) is not None:
        return kernel.DENSE_PRODUCT(x, weight, across)
    return torch.mm(x, weight if across else weight.t())


def write_frozen_product(to: Tensor, x: Tensor, weight: Tensor) -> None:
    """Writes x·Wᵀ to `to` (tokens, out), of the dtype of x."""
    weight = weight.to(x.dtype)
    kernel = dense_products(x, weight)
    if kernel is not None and to.dtype == x.dtype and to.is_contiguous():
        kernel.DENSE_PRODUCT_ADD(to, x, weight, False, False)
    else:
        torch.mm(x, weight.t(), out=to)


def add_frozen_product(to: Tensor, x: Tensor, weight: Tensor, *, across: bool = False) -> None:
    """Adds the product of `frozen_product` to `to` (tokens, ·), in place."""
    weight = weight.to(x.dtype)
    kernel = dense_products(x, weight)
    if kernel is not None and to.dtype == x.dtype and to.is_contiguous():
        kernel.DENSE_PRODUCT_ADD(to, x, weight, across)
        torch.autograd.graph.increment_version(to)
    elif not is_cpu(to.device) and to.dtype == x.dtype:
        to.addmm_(x, weight if across else weight.t())
    else:
        to.add_(frozen_product(x, weight, across=across))


class DenseBase:
    """The weight (out, in) of an nn.Linear, read from the module at each call, so that moves and casts take effect."""

    transposed = False  # whether the module stores it as (in, out)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        return frozen_product(x, self.weight, across=self.transposed)

    def matmul_t(self, grad: Tensor) -> Tensor:
        return frozen_product(grad, self.weight, across=not self.transposed)

    def add_matmul_t(self, to: Tensor, grad: Tensor) -> None:
        """Adds grad·W to `to` (tokens, in), in place."""
        add_frozen_product(to, grad, self.weight, across=not self.transposed)

    def dense(self) -> Tensor:
        return self.weight.detach()

    def stored(self) -> StoredWeight | None:
        """As C reads it; None if it is trained, transposed, or not bf16 on the CPU."""
        weight = self.weight
        if self.transposed or weight.requires_grad or weight.dim() != 2:
            return None
        read = type(weight) in operators.READ and operators.supports(weight)
        if not read:
            return None
        return StoredWeight(DENSE, weight.shape[0], weight.shape[1], weight.data_ptr(), owners=(weight.detach(),))

    def tensors(self) -> Sequence[Tensor]:
        """The tensors in which it is stored."""
        return (self.weight,)

    def store(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(weight)


class TransposedBase(DenseBase):
    """GPT-2's Conv1D stores its weight as (in, out); this base presents it as (out, in)."""

    transposed = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[0]

    def dense(self) -> Tensor:
        return self.weight.detach().t()

    def store(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(weight.t())


class SliceBase(DenseBase):
    """One expert's matrix out of a 3-D parameter (experts, out, in)."""

    def __init__(self, stacked: Tensor, index: int) -> None:
        self.stacked, self.index = stacked, index

    @property
    def weight(self) -> Tensor:
        return self.stacked[self.index]


class TransposedSliceBase(TransposedBase):
    """One expert's matrix out of a 3-D parameter that is stored as (experts, in, out)."""

    def __init__(self, stacked: Tensor, index: int) -> None:
        self.stacked, self.index = stacked, index

    @property
    def weight(self) -> Tensor:
        return self.stacked[self.index]

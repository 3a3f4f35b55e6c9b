"""A frozen weight in packed buffers, and the linear layer over it. Each quantisation method is a subclass of `PackedBase`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.base import add_frozen_product, frozen_product
from lorakeet.core.lowrank import frozen_linear
from lorakeet.core.scratch import SCRATCH
from lorakeet.kernels.choose import add_product_as_stored, dequantised, product_as_stored
from lorakeet.kernels.cpu.stored import StoredWeight, is_readable
from lorakeet.kernels.device import is_cpu
from lorakeet.kernels.gptq_words import GptqWords
from lorakeet.kernels.nf4_codes import Nf4Codes

TILE = 1 << 20  # numbers packed or unpacked at once: their temporary copies stay in a CPU's cache
GPU_TILE = 1 << 24  # on a GPU a call costs more than the memory it takes
PART_BYTES = 32 << 20  # of W in fp32 dequantised at once on a CPU; for products in bf16 all of W is


class PackedBase(nn.Module):
    """A frozen weight W (out, in) in packed buffers; a FrozenBase (core/base).

    A subclass registers its buffers and implements `unpack_by_torch` and `store`. Kernels multiply by the packed buffers and
    dequantise them (kernels/choose), if the subclass describes them (`_stored_weight`). Otherwise W is dequantised
    for each product into one buffer that all bases share (core/scratch), in fp32 some rows at a time. So one dense matrix
    exists at a time, and autograd never sees it.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self._shape = shape

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    @property
    def bytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.packed_buffers())

    @property
    def row_step(self) -> int:
        """The first row of `unpack` must be a multiple of this."""
        return 1

    @property
    def device(self) -> torch.device:
        """The device of the packed buffers."""
        return next(self.packed_buffers()).device

    def packed_buffers(self) -> Iterator[Tensor]:
        """The packed buffers; those that models/text/shard has sharded are parameters."""
        return itertools.chain(self.parameters(), self.buffers())

    @property
    def settings(self) -> dict[str, Any]:
        """All that is needed to interpret the buffers, as values that JSON can hold."""
        raise NotImplementedError(f"{type(self).__name__} must say what its buffers mean.")

    def unpack(self, out: Tensor, first: int = 0) -> Tensor:
        """Dequantises the rows of W from `first` (a multiple of `row_step`) on into `out` (rows, in), and returns it.

        Numbers are rounded once, to the dtype of `out`.
        """
        return out if dequantised(self, out, first) else self.unpack_by_torch(out, first)

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        """`unpack` by torch's operations."""
        raise NotImplementedError(f"{type(self).__name__} must say how its buffers are unpacked.")

    def store(self, weight: Tensor) -> None:
        """Quantises `weight` (out, in) into the buffers."""
        raise NotImplementedError(f"{type(self).__name__} must say how a weight is packed.")

    def dense(self) -> Tensor:
        """W dequantised, as a new fp32 tensor (out, in)."""
        return self.unpack(torch.empty(self.shape, dtype=torch.float32, device=self.device))

    def nf4_codes(self, first: int, rows: int) -> Nf4Codes | None:
        """`rows` rows of W from `first` on as NF4 codes in whole blocks; None if they are none."""
        return None

    def gptq_words(self) -> GptqWords | None:
        """W in GPTQ's words; None if it is in others."""
        return None

    def _stored_weight(self) -> StoredWeight | None:
        """The buffers as C reads them; None for settings or numbers that C does not support."""
        return None

    def stored(self) -> StoredWeight | None:
        """W as C reads it (kernels/cpu/stored); None if it cannot."""
        tensors = self.tensors()
        weight = self._stored_weight() if not self._parameters and is_readable(self.shape, tensors) else None
        return None if weight is None else weight._replace(owners=tuple([each.detach() for each in tensors]))

    def tensors(self) -> list[Tensor]:
        """The packed buffers that are no parameters."""
        return [each for each in self._buffers.values() if each is not None]

    def matmul(self, x: Tensor) -> Tensor:
        """Returns x·Wᵀ (tokens, out) in the dtype of x (tokens, in)."""
        if (product := product_as_stored(self, x)) is not None:
            return product
        first, *others = self._parts(x.dtype)
        if not others:
            return frozen_product(x, self._rows(first, x.dtype))
        y = x.new_empty(len(x), self.shape[0])
        for part in (first, *others):
            torch.mm(x, self._rows(part, x.dtype).t(), out=y[:, part])
        return y

    def matmul_t(self, grad: Tensor) -> Tensor:
        """Returns grad·W (tokens, in) in the dtype of grad (tokens, out)."""
        if (product := product_as_stored(self, grad, across=True)) is not None:
            return product
        first, *others = self._parts(grad.dtype)
        if not others:
            return frozen_product(grad, self._rows(first, grad.dtype), across=True)
        found = torch.mm(grad[:, first], self._rows(first, grad.dtype))
        for part in others:
            found.addmm_(grad[:, part], self._rows(part, grad.dtype))
        return found

    def add_matmul_t(self, to: Tensor, grad: Tensor) -> None:
        """Adds grad·W to `to` (tokens, in) in place; rounds once, with the sum, if W is multiplied whole."""
        if add_product_as_stored(self, to, grad, across=True):
            return
        parts = self._parts(grad.dtype)
        if len(parts) > 1:
            to.add_(self.matmul_t(grad))
        else:
            add_frozen_product(to, grad, self._rows(parts[0], grad.dtype), across=True)

    def _parts(self, dtype: torch.dtype) -> list[slice]:
        """Slices of rows to dequantise at once: all rows, but in fp32 on a CPU at most `PART_BYTES`."""
        rows, width = self.shape
        at_once = rows
        if dtype == torch.float32 and is_cpu(self.device):
            step = self.row_step
            at_once = max(step, PART_BYTES // (width * dtype.itemsize) // step * step)
        return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]

    def in_parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of rows and their numbers in fp32, valid until the next ones."""
        for part in self._parts(torch.float32):
            yield part, self._rows(part, torch.float32)

    def _rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """These rows of W in the shared buffer, valid until others are unpacked."""
        out = SCRATCH.matrix((part.stop - part.start, self.shape[1]), dtype, self.device)
        return self.unpack(out, part.start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBase:
        """Moves the buffers; a cast of the model (`.to(bfloat16)`, `.half()`) leaves their dtypes, since they hold codes."""

        def moved(buffer: Tensor) -> Tensor:
            applied = fn(buffer)
            return applied if applied.dtype == buffer.dtype else buffer.to(applied.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]


def tile_size(device: torch.device, multiple: int) -> int:
    """How many numbers to pack or unpack at once on `device`: about TILE, and a multiple of `multiple`."""
    wanted = TILE if is_cpu(device) else GPU_TILE
    return max(1, wanted // multiple) * multiple


class PackedLinear(nn.Module):
    """Replaces an nn.Linear: x·Wᵀ + b over a packed weight, differentiable in x.

    `transposed`: it replaces GPT-2's Conv1D, whose own weight is (in, out); the base is (out, in) nevertheless.
    """

    products: torch.dtype | None = None  # dtype of the matrix products (core/precision); None: that of the input

    def __init__(self, base: PackedBase, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.base = base
        self.transposed = transposed
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.base.shape[1]

    @property
    def out_features(self) -> int:
        return self.base.shape[0]

    @property
    def weight(self) -> Tensor:
        """W dequantised, as a new fp32 tensor in the orientation of the module that was replaced.

        Products do not use it.
        """
        dense = self.base.dense()
        return dense.t() if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.base, bias=self.bias, products=self.products)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

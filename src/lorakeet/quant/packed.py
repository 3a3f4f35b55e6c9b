"""A weight kept in packed buffers, and the linear layer that holds it. Each way of packing is one subclass of `PackedBase`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.lowrank import frozen_linear

TILE = 1 << 20  # numbers that are packed or unpacked at once: their temporary copies stay in a CPU's cache
GPU_TILE = 1 << 24  # on a GPU a call costs more than the memory that it takes


class PackedBase(nn.Module):
    """A frozen weight W (out, in) in packed buffers; a FrozenBase (core/base).

    A subclass registers its buffers and answers `unpack` and `store`. W is brought back for each product into one buffer that
    all bases share (`Scratch`), so that however many layers a model has, one dense matrix exists at a time, and autograd
    never sees it.
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
        """What the packed buffers take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where the packed buffers are."""
        return next(self.buffers()).device

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that is needed to read the buffers again but their numbers, as plain values that JSON can hold."""
        raise NotImplementedError(f"{type(self).__name__} must say what its buffers mean.")

    def unpack(self, out: Tensor) -> Tensor:
        """Writes W, dequantised, into `out` (out, in), whose dtype it is rounded to once, and returns it."""
        raise NotImplementedError(f"{type(self).__name__} must say how its buffers are unpacked.")

    def store(self, weight: Tensor) -> None:
        """Quantises `weight` (out, in) into the buffers."""
        raise NotImplementedError(f"{type(self).__name__} must say how a weight is packed.")

    def dense(self) -> Tensor:
        """W, dequantised, as a fresh fp32 tensor (out, in)."""
        return self.unpack(torch.empty(self.shape, dtype=torch.float32, device=self.device))

    def matmul(self, x: Tensor) -> Tensor:
        """x (tokens, in) to x·Wᵀ (tokens, out) in the dtype of x."""
        return torch.mm(x, self._unpacked(x.dtype).t())

    def matmul_t(self, grad: Tensor) -> Tensor:
        """grad (tokens, out) to grad·W (tokens, in) in the dtype of grad."""
        return torch.mm(grad, self._unpacked(grad.dtype))

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        """W in the shared buffer: valid until the next base is unpacked."""
        return self.unpack(SCRATCH.matrix(self.shape, dtype, self.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBase:
        """Moves the buffers; a cast of the model (`.to(bfloat16)`, `.half()`) leaves them as they are, since they are a code."""

        def moved(buffer: Tensor) -> Tensor:
            applied = fn(buffer)
            return applied if applied.dtype == buffer.dtype else buffer.to(applied.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]


def tile_of(device: torch.device, multiple: int) -> int:
    """How many numbers to pack or unpack at once on a device: about TILE, in whole multiples of `multiple`."""
    wanted = TILE if device.type == "cpu" else GPU_TILE
    return max(1, wanted // multiple) * multiple


def _world(tensor: Tensor) -> object:
    """What a tensor's numbers belong to: the trace that made it, or its plain type."""
    return getattr(tensor, "fake_mode", type(tensor))


class Scratch:
    """One growing buffer for each device and dtype, lent as a matrix until it is asked for again.

    Fake tensors, with which a step is traced, have buffers of their own; whoever traces clears them after it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device, object], Tensor] = {}

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of that shape; the tensor lent before is no longer valid."""
        size = shape[0] * shape[1]
        key = (dtype, device, _world(torch.empty(0, device=device)))
        held = self._buffers.get(key)
        if held is None or held.numel() < size:
            self._buffers.pop(key, None)
            held = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)

    def clear(self) -> None:
        """Gives the memory back."""
        self._buffers.clear()


SCRATCH = Scratch()


class PackedLinear(nn.Module):
    """Stands where an nn.Linear stood: x·Wᵀ + b over a packed weight, differentiable in x.

    `transposed` marks one that stands for GPT-2's Conv1D, whose own weight is (in, out); the base is (out, in) all the same.
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
        """W, dequantised, as a fresh fp32 tensor in the orientation of the module that this one stands for.

        For code that reads a weight; products go through the base, which needs no such copy.
        """
        dense = self.base.dense()
        return dense.t() if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.base, bias=self.bias, products=self.products)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

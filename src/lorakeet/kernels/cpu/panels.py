"""Weights packed for products of a few tokens (panels.c), which cost as much as reading the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.operators import LANES, loaded, pointers

NEEDS = "matrices of an even width"


class Product(ctypes.Structure):
    """The Product of panels.h: a weight, its bias (may be null), and its columns in y."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "column")),
    )


class Panels:
    """A bf16 weight (out, in) in panels of 16 outputs: (panels, in/2, 16) words of two numbers, the last one padded."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` must satisfy `takes`."""
        outputs, width = weight.shape
        self.shape = (outputs, width)
        filled = weight.detach().contiguous()
        if outputs % LANES:
            filled = torch.nn.functional.pad(filled, (0, 0, 0, -outputs % LANES))
        self.numbers = filled.view(-1, LANES, width // 2, 2).transpose(1, 2).contiguous()  # (panels, in/2, 16, 2)
        self._alone = PanelGroup([self])

    def __deepcopy__(self, memo: dict[int, object]) -> Panels:
        return Panels(self.dense())

    def dense(self) -> Tensor:
        """Restores the weight (out, in), to the last bit."""
        outputs, width = self.shape
        return self.numbers.transpose(1, 2).reshape(-1, width)[:outputs].contiguous()

    def product(self, x: Tensor) -> Tensor:
        """x (tokens, in) to (tokens, out), both bf16."""
        return self._alone.product(x)


class PanelGroup:
    """Weights that are multiplied with the same x in one call."""

    def __init__(self, weights: Sequence[Panels]) -> None:
        self.outputs = [weight.shape[0] for weight in weights]
        self.width = weights[0].shape[1]
        self._held = [weight.numbers for weight in weights]
        self._products = (Product * len(weights))()
        column = 0
        for product, numbers, outputs in zip(self._products, self._held, self.outputs, strict=True):
            product.weight, product.outputs, product.column = numbers.data_ptr(), outputs, column
            column += outputs
        self.columns = column
        self._sizes = ctypes.c_int64(self.width), ctypes.c_int64(column)

    def product(self, x: Tensor) -> Tensor:
        """x (tokens, in) to the outputs of all weights side by side (tokens, columns), both bf16."""
        if x.dtype != torch.bfloat16 or x.shape[1:] != (self.width,):
            raise ValueError(f"x is {tuple(x.shape)} in {x.dtype}; the weights take (tokens, {self.width}) in bfloat16")
        x = x.contiguous()
        y = torch.empty(len(x), self.columns, dtype=x.dtype)
        given = *pointers(x), self._products, ctypes.c_int64(len(self._products)), *pointers(y)
        loaded().linear(*given, ctypes.c_int64(len(x)), *self._sizes, torch.get_num_threads())
        return y


def takes(weight: Tensor) -> bool:
    """True for a weight (out, in) that can be packed."""
    return type(weight) in operators.READ and weight.dim() == 2 and weight.shape[1] % 2 == 0

"""Copies of pairs as pairs.c reads them, and what it adds with them to the outputs of layers.

A step of a server asks for this a hundred times, for 20 µs of work each, so that what does not change is laid out once.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.device import is_cpu
from lorakeet.core.native.library import library
from lorakeet.core.native.ops import serves

WIDTH, OUTPUTS = 32, 16  # what the sizes of layers are multiples of
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BYTES = 2


class _Layer(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64), ("outputs", ctypes.c_int64), ("y", ctypes.c_void_p), ("stride", ctypes.c_int64))


class Shares:
    """Tokens that use one mix each, and where the copies of its pairs are: (address, rank) by the layer's number."""

    def __init__(self, shares: Iterable[tuple[Iterable[int], array[int]]]) -> None:
        """Whoever made the copies keeps them."""
        given = [(array("q", tokens), copies) for tokens, copies in shares]
        self._held = given
        self.count = len(given)
        self.numbers = array("q", (n for own, at in given for n in (own.buffer_info()[0], len(own), at.buffer_info()[0])))
        self.address = self.numbers.buffer_info()[0]


class LayerRows:
    """Layers that see the same x, with the numbers that copies know them by."""

    def __init__(self, shapes: Sequence[tuple[int, int]], numbers: Sequence[int]) -> None:
        """For weights of `shapes` (out, in) for which there are `fits`."""
        self.width = shapes[0][1]
        self._layers = (_Layer * len(shapes))()
        for layer, number, (outputs, _) in zip(self._layers, numbers, shapes, strict=True):
            layer.number, layer.outputs = number, outputs
        self._all, self._at = list(self._layers), ctypes.addressof(self._layers)
        self._add = _function("add_pairs", [ctypes.c_void_p, ctypes.c_int64] * 3 + [ctypes.c_int64, ctypes.c_int])

    def add(self, ys: Sequence[Tensor], x: Tensor, shares: Shares) -> None:
        """Adds to each layer's y (tokens, out), in place; rows of y may lie apart, those of x (tokens, in) too. All bf16."""
        for layer, y in zip(self._all, ys, strict=True):
            layer.y, layer.stride = y.data_ptr(), _row(y, layer.outputs)
        rows = len(self._all)
        row = _row(x, self.width)
        self._add(shares.address, shares.count, self._at, rows, x.data_ptr(), row, self.width, torch.get_num_threads())


def _row(x: Tensor, width: int) -> int:
    """How far one row is from the next; ValueError for what C cannot read so."""
    row, column = x.stride()
    if column != 1 or x.dtype is not torch.bfloat16 or x.shape[1] != width:
        raise ValueError(f"the rows of {tuple(x.shape)} in {x.dtype}, {column} apart in a row, are no rows of {width} in bfloat16")
    return row


def fits(products: torch.dtype, device: torch.device, shapes: Iterable[tuple[int, int]]) -> bool:
    """Whether layers with weights of `shapes` (out, in) are for this."""
    return is_cpu(device) and all(not out % OUTPUTS and not width % WIDTH for out, width in shapes) and serves(products)


def bytes_of(rank: int, shape: tuple[int, int]) -> int:
    """Of the copy of pairs that have such a rank together, each filled up to an even one, on a weight of `shape`."""
    return rank * sum(shape) * _BYTES


class Copying:
    """A's and B's on their way to copies, all of which are made in one go."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._factors, self._scales = array("q"), array("f")

    def add(self, A: Tensor, B: Tensor, scale: float, to_a: int, to_b: int) -> None:
        """A (rank, in) goes to the address `to_a`, scale·Bᵀ to `to_b`."""
        if A.dtype not in _KINDS or not A.is_contiguous() or not is_cpu(A.device):
            A = A.to("cpu", torch.float32).contiguous()
        if B.dtype not in _KINDS or not B.is_contiguous() or not is_cpu(B.device):
            B = B.to("cpu", torch.float32).contiguous()
        self._kept += (A, B)
        (rank, width), outputs = A.shape, B.shape[0]
        factors = A.data_ptr(), B.data_ptr(), _KINDS[A.dtype], _KINDS[B.dtype], rank, width, outputs, to_a, to_b
        self._factors.extend(factors)
        self._scales.append(scale)

    def run(self) -> None:
        at, scales = (numbers.buffer_info()[0] for numbers in (self._factors, self._scales))
        copy = _function("copy_pairs", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int])
        copy(at, scales, len(self._scales), torch.get_num_threads())


def filled(rank: int) -> int:
    """The rows that a copy has for a pair of such a rank."""
    return rank + rank % 2


def to_b(at: int, above: int, rank: int, shape: tuple[int, int]) -> int:
    """Where B's rows go, `above` rows below the first of a copy at `at`, whose rank is `rank`."""
    return at + _BYTES * (rank * shape[1] + above * shape[0])


def to_a(at: int, above: int, shape: tuple[int, int]) -> int:
    """The same of A's."""
    return at + _BYTES * above * shape[1]


def _function(name: str, kinds: Sequence[Any]) -> Any:
    found = library()
    assert found is not None  # `fits` has said so
    function = found[name]  # one of its own, not that which others call otherwise
    function.argtypes, function.restype = list(kinds), None
    return function

"""Low-rank pairs of many adapters, copied into the layout of pairs.c, and added to the outputs of layers.

A server's step calls this a hundred times, for 20 µs of work each, so everything constant is prepared once.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu.operators import loaded

WIDTH, OUTPUTS = 32, 16  # the sizes of layers are multiples of these
NEEDS = f"widths in multiples of {WIDTH}, outputs of {OUTPUTS}"
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BYTES = 2
_ADD = [ctypes.c_void_p, ctypes.c_int64] * 3 + [ctypes.c_int64, ctypes.c_int]
_COPY = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
PairKind = tuple[int, int, torch.dtype, torch.dtype]  # the layer, the rank, and the dtypes of A and B


def even(rank: int) -> int:
    """`rank` padded to an even number: C multiplies two numbers at a time along it."""
    return rank + rank % 2


class _LayerLayout(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64), ("outputs", ctypes.c_int64), ("y", ctypes.c_void_p), ("stride", ctypes.c_int64))


class Shares:
    """Tokens that use one mix of adapters each, and the copies of its pairs: (layers, 2), address and rank of each layer."""

    def __init__(self, shares: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """The caller must keep the copies alive."""
        self._held = [(array("q", tokens), copies) for tokens, copies in shares]
        self.count = len(self._held)
        numbers = [(own.buffer_info()[0], len(own), copies.data_ptr()) for own, copies in self._held]
        self._numbers = array("q", [number for share in numbers for number in share])
        self.address = self._numbers.buffer_info()[0]


class LayerRows:
    """Layers that share their input, with the numbers that copies know them by."""

    def __init__(self, shapes: Sequence[tuple[int, int]], numbers: Sequence[int]) -> None:
        """For weights of `shapes` (out, in) that `takes` accepts."""
        self.width = shapes[0][1]
        self._layers = (_LayerLayout * len(shapes))()
        for layer, number, (outputs, _) in zip(self._layers, numbers, shapes, strict=True):
            layer.number, layer.outputs = number, outputs
        self._all, self._at = list(self._layers), ctypes.addressof(self._layers)
        self._add = _function("add_pairs", _ADD)

    def add(self, ys: Sequence[Tensor], x: Tensor, shares: Shares) -> None:
        """Adds the pairs to each layer's y (tokens, out), in place; rows of y and of x (tokens, in) may be strided. All bf16."""
        for layer, y in zip(self._all, ys, strict=True):
            layer.y, layer.stride = y.data_ptr(), _row(y, layer.outputs)
        rows = len(self._all)
        row = _row(x, self.width)
        self._add(shares.address, shares.count, self._at, rows, x.data_ptr(), row, self.width, torch.get_num_threads())


def _row(x: Tensor, width: int) -> int:
    """The stride of a row; ValueError for a layout that C cannot read."""
    row, column = x.stride()
    if column != 1 or x.dtype is not torch.bfloat16 or x.shape[1] != width or not x.is_cpu:
        given = f"{tuple(x.shape)} in {x.dtype}, {column} apart"
        raise ValueError(f"expected rows of {width} contiguous bfloat16 numbers; given: {given}")
    return row


def takes(shapes: Iterable[tuple[int, int]]) -> bool:
    """True for layers with weights of such `shapes` (out, in)."""
    return all(not out % OUTPUTS and not width % WIDTH for out, width in shapes)


class PairLayout:
    """The layout of a mix's pairs in its copy, layer after layer, each with an even rank.

    It is shared by mixes with the same shapes, each of which then costs a few operations.
    """

    def __init__(self, pairs: Sequence[PairKind], shapes: Sequence[tuple[int, int]]) -> None:
        """For `pairs` in the order of their layers, whose weights have the `shapes` (out, in)."""
        ranks = [0] * len(shapes)
        for layer, rank, _, _ in pairs:
            ranks[layer] += even(rank)
        firsts = list(accumulate((_BYTES * rank * sum(shape) for rank, shape in zip(ranks, shapes, strict=True)), initial=0))
        self.bytes = firsts.pop()
        self.held = sum(1 << layer for layer, rank in enumerate(ranks) if rank)  # a bit for each layer that has a pair
        self._at = torch.tensor(list(zip(firsts, ranks, strict=True)), dtype=torch.int64).view(-1, 2)
        above, rows = dict.fromkeys(range(len(shapes)), 0), []
        for layer, rank, of_a, of_b in pairs:
            (outputs, width), total = shapes[layer], ranks[layer]
            to_a = firsts[layer] + _BYTES * WIDTH * above[layer]
            to_b = firsts[layer] + _BYTES * (total * width + OUTPUTS * above[layer])
            rows.append((0, 0, _KINDS[of_a], _KINDS[of_b], rank, width, outputs, total, to_a, to_b))
            above[layer] += even(rank)
        self._factors = torch.tensor(rows, dtype=torch.int64).view(-1, 10)

    def at(self, memory: Tensor) -> Tensor:
        """(layers, 2): address and rank of each layer in a copy stored in `memory`."""
        return self._at + torch.tensor([memory.data_ptr(), 0])

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor, float]], memory: Tensor) -> None:
        """Copies A (rank, in) and scale·B (out, rank) of each pair, all `as_readable`, into `memory`."""
        factors = self._factors.clone()
        factors[:, :2] = torch.tensor([(A.data_ptr(), B.data_ptr()) for A, B, _ in pairs], dtype=torch.int64).view(-1, 2)
        factors[:, 8:] += memory.data_ptr()
        scales = torch.tensor([scale for _, _, scale in pairs], dtype=torch.float32)
        _function("copy_pairs", _COPY)(factors.data_ptr(), scales.data_ptr(), len(pairs), torch.get_num_threads())


def as_readable(x: Tensor) -> Tensor:
    """x itself if C can copy from it, else a copy that C can read."""
    return x if x.dtype in _KINDS and x.is_contiguous() and x.is_cpu else x.to("cpu", torch.float32).contiguous()


def _function(name: str, kinds: Sequence[Any]) -> Any:
    function = loaded()[name]  # a function object of its own, so that argtypes are not shared
    function.argtypes, function.restype = list(kinds), None
    return function

"""Low-rank products of pairs in training, each pair on its own rows, as operators of torch (trained_pairs.c).

Pairs are given as `factors`, A and B alternating, with `scales`, and `places`, three numbers each: the first row, the row after
the last, and the layer. Consecutive pairs on the same rows form a part; parts share no row. h = x·Aᵀ and u = s·g·B of all parts
are stored one after another in one tensor, as trained_pairs.c describes.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.inference_pairs import even
from lorakeet.kernels.cpu.operators import define, loaded, pointers

WIDTH = 32  # widths are multiples of this
NEEDS = f"contiguous bfloat16, widths in multiples of {WIDTH}"
KINDS = {torch.float32: 0, torch.bfloat16: 1}
Shape = tuple[int, ...]


def takes(states: Sequence[Tensor], factors: Sequence[Tensor], places: Sequence[int]) -> bool:
    """True for states (x, and all y's) and pairs that C can multiply."""
    return bool(factors) and operators.takes(states, WIDTH) and all(map(is_factor, factors)) and parts_are_disjoint(places)


def is_factor(factor: Tensor) -> bool:
    """True if C can read the tensor as A or B of a pair; rank 0 is not supported."""
    return type(factor) in operators.PLAIN and factor.dtype in KINDS and factor.is_contiguous() and factor.numel() > 0


def parts_are_disjoint(places: Sequence[int]) -> bool:
    """True if every part has rows, and no two parts share one: they are computed in parallel."""
    spans = sorted((places[3 * part[0]], places[3 * part[0] + 1]) for part in _parts(places))
    return all(start < stop for start, stop in spans) and all(before[1] <= behind[0] for before, behind in pairwise(spans))


class PairsLayout:
    """The layout of pairs' products in h and u, and how many numbers of workspace they need."""

    def __init__(self, shapes: Sequence[Shape], places: Sequence[int]) -> None:
        """For factors of these shapes."""
        self.pairs: list[tuple[int, ...]] = []  # rank, start, stop, layer, from, columns, column: as in trained_pairs.h
        self.numbers = self.forward = self.interleaved = 0  # of h; of workspace, forward and for interleaved rows
        wide = 0
        for part in _parts(places):
            start, stop = places[3 * part[0] : 3 * part[0] + 2]
            ranks = [shapes[2 * pair][0] for pair in part]
            columns, column = sum(map(even, ranks)), 0
            for pair, rank in zip(part, ranks, strict=True):
                self.pairs.append((rank, start, stop, places[3 * pair + 2], self.numbers, columns, column))
                column += even(rank)
            width = shapes[2 * part[0]][1]
            self.numbers += (stop - start) * columns
            self.interleaved += even(stop - start) * columns
            self.forward += width * _whole(columns)
            wide += width * columns
        each = [(pair[0], B[0]) for pair, B in zip(self.pairs, shapes[1::2], strict=True)]
        self.forward += sum(outputs * even(rank) for rank, outputs in each)
        self.backward = self.interleaved + wide + sum(outputs * _whole(rank) for rank, outputs in each)

    def as_array(self, factors: Sequence[Tensor]) -> array[int]:
        """The pairs as C reads them."""
        pairs = array("q")
        for A, B, pair in zip(factors[::2], factors[1::2], self.pairs, strict=True):
            pairs.extend((A.data_ptr(), B.data_ptr(), KINDS[A.dtype], KINDS[B.dtype], *pair))
        return pairs

    def scaled(self, scales: Sequence[float]) -> array[float]:
        """The scale of each pair, for C."""
        if len(scales) != len(self.pairs):
            raise ValueError(f"{len(scales)} scales are not one for each of {len(self.pairs)} pairs")
        return array("f", scales)


@lru_cache(maxsize=64)  # a few recur within a step
def cached_layout(shapes: tuple[Shape, ...], places: Shape, outputs: Shape | None, tokens: int, width: int) -> PairsLayout:
    """The layout for these shapes. ValueError if a pair does not fit rows (tokens, width), or its layer's `outputs`."""
    for number, (A, B) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        start, stop, layer = places[3 * number : 3 * number + 3]
        fit = (A[0], width) == A and (B[0], A[0]) == B and A[0] > 0 and not width % WIDTH and not B[0] % WIDTH
        own = outputs is None or (0 <= layer < len(outputs) and outputs[layer] == B[0])
        if not (fit and own and 0 <= start <= stop <= tokens):
            y = f" and ({tokens}, {outputs[layer]})" if outputs and 0 <= layer < len(outputs) else ""
            raise ValueError(f"A {A} and B {B} on rows {start} to {stop} do not fit rows ({tokens}, {width}){y} in whole {WIDTH}")
    if not parts_are_disjoint(places):
        raise ValueError(f"parts must have rows, and share none; given places: {list(places)}")
    return PairsLayout(shapes, places)


def shapes_of(factors: Sequence[Tensor]) -> tuple[Shape, ...]:
    """The factors' shapes; ValueError for numbers that C cannot read."""
    if any(factor.dtype not in KINDS or not factor.is_contiguous() for factor in factors):
        raise ValueError(f"factors are contiguous, in {' or '.join(map(str, KINDS))}; given: {[each.dtype for each in factors]}")
    return tuple([tuple(factor.shape) for factor in factors])


def pairs_layout(
    factors: Sequence[Tensor], places: Sequence[int], tokens: int, ys: Sequence[Tensor] | None = None, h: Tensor | None = None
) -> PairsLayout:
    """The layout of the products; ValueError for factors, places or states that do not fit each other."""
    shapes = shapes_of(factors)
    outputs = None if ys is None else tuple([y.shape[1] for y in ys])
    if not shapes or len(places) * 2 != len(shapes) * 3 or any(len(y) != tokens for y in ys or ()):
        given = f"{len(shapes)} factors, {len(places)} numbers of places"
        raise ValueError(f"{given}, {tokens} tokens of x and {[*map(len, ys or ())]} of y do not fit each other")
    laid = cached_layout(shapes, tuple(places), outputs, tokens, shapes[0][1])
    if h is not None and h.numel() != laid.numbers:
        raise ValueError(f"h has {h.numel()} numbers; these pairs' parts have {laid.numbers}")
    return laid


def _parts(places: Sequence[int]) -> Iterator[list[int]]:
    """The indices of consecutive pairs on the same rows."""
    part: list[int] = []
    for pair in range(len(places) // 3):
        if part and places[3 * pair : 3 * pair + 2] != places[3 * part[0] : 3 * part[0] + 2]:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def _whole(columns: int) -> int:
    return -(-columns // operators.LANES) * operators.LANES


def _layers(rows: Sequence[Tensor]) -> array[int]:
    """The y or g of each layer as C reads it."""
    return array("q", [number for at, y in zip(pointers(*rows), rows, strict=True) for number in (at.value or 0, y.shape[1])])


def _address(numbers: array[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])


def trained_pairs_(ys: list[Tensor], x: Tensor, factors: list[Tensor], places: list[int], scales: list[float]) -> Tensor:
    """Adds s·x·Aᵀ·Bᵀ to the rows of each pair's y (tokens, out), in place, for x (tokens, in); returns h of all parts."""
    laid = pairs_layout(factors, places, len(x), ys)
    h, scratch = x.new_empty(laid.numbers), x.new_empty(laid.forward)
    pairs, scaled, layers = laid.as_array(factors), laid.scaled(scales), _layers(ys)
    given = _address(pairs), _address(scaled), ctypes.c_int64(len(scaled)), _address(layers), *pointers(x), _width(x, factors)
    loaded().trained_pairs(*given, *pointers(h, scratch), torch.get_num_threads())
    return h


def trained_pairs_backward_(
    grad_x: Tensor | None, grads: list[Tensor], h: Tensor, factors: list[Tensor], places: list[int], scales: list[float]
) -> tuple[Tensor, Tensor]:
    """u = s·g·B of all parts, and ∂B = s·gᵀ·h (out, rank) in fp32, pair after pair, from each layer's g (tokens, out).

    Adds u·A to `grad_x` (tokens, in), in place, unless it is None.
    """
    laid = pairs_layout(factors, places, len(grads[0] if grad_x is None else grad_x), grads, h)
    u, scratch = torch.empty_like(h), h.new_empty(laid.backward)
    of_b = h.new_empty(sum(B.numel() for B in factors[1::2]), dtype=torch.float32)
    pairs, scaled, layers = laid.as_array(factors), laid.scaled(scales), _layers(grads)
    to, width = (None, ctypes.c_int64(factors[0].shape[1])) if grad_x is None else (*pointers(grad_x), _width(grad_x, factors))
    given = _address(pairs), _address(scaled), ctypes.c_int64(len(scaled)), _address(layers), to, width
    found = *pointers(h, u), *pointers(of_b, dtype=torch.float32), *pointers(scratch)
    loaded().trained_pairs_backward(*given, *found, torch.get_num_threads())
    return u, of_b


def trained_pairs_of_a(u: Tensor, x: Tensor, factors: list[Tensor], places: list[int]) -> Tensor:
    """∂A = uᵀ·x (rank, in) in fp32, pair after pair, from u of all parts and x (tokens, in)."""
    laid = pairs_layout(factors, places, len(x), None, u)
    scratch, of_a = x.new_empty(laid.interleaved), x.new_empty(sum(A.numel() for A in factors[::2]), dtype=torch.float32)
    pairs = laid.as_array(factors)
    given = _address(pairs), ctypes.c_int64(len(laid.pairs)), *pointers(u, x), _width(x, factors)
    loaded().trained_pairs_of_a(*given, *pointers(of_a, dtype=torch.float32), *pointers(scratch), torch.get_num_threads())
    return of_a


def _width(x: Tensor, factors: Sequence[Tensor]) -> ctypes.c_int64:
    """The width of x, checked against A's."""
    if x.shape[1] != factors[0].shape[1]:
        raise ValueError(f"rows {tuple(x.shape)} do not fit A {tuple(factors[0].shape)}")
    return ctypes.c_int64(x.shape[1])


def _sizes(factors: Sequence[Tensor], places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Tokens × rank, the width and the outputs of each pair."""
    for number, (A, B) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
        yield (places[3 * number + 1] - places[3 * number]) * len(A), A.shape[1], len(B)


def _backward_flops(
    grad_x: Tensor | None, grads: list[Tensor], h: Tensor, factors: list[Tensor], places: list[int], *_: Any, **__: Any
) -> int:
    """FLOPs of the two or three products of `trained_pairs_backward_`."""
    wide = grad_x is not None
    return sum(2 * times * (width * wide + 2 * outputs) for times, width, outputs in _sizes(factors, places))


_PAIRS = "Tensor[] factors, int[] places"
TRAINED_PAIRS = define(
    f"trained_pairs_(Tensor(a!)[] ys, Tensor x, {_PAIRS}, float[] scales) -> Tensor",
    trained_pairs_,
    lambda ys, x, factors, places, _: x.new_empty(pairs_layout(factors, places, len(x), ys).numbers),
    lambda ys, x, factors, places, *_, **__: sum(
        2 * times * (width + outputs) for times, width, outputs in _sizes(factors, places)
    ),
    lambda ys, x, factors, places, _: 2 * pairs_layout(factors, places, len(x), ys).forward,
)
TRAINED_PAIRS_BACKWARD = define(
    f"trained_pairs_backward_(Tensor(a!)? grad_x, Tensor[] grads, Tensor h, {_PAIRS}, float[] scales) -> (Tensor, Tensor)",
    trained_pairs_backward_,
    lambda _, __, h, factors, *___: (
        torch.empty_like(h),
        h.new_empty(sum(B.numel() for B in factors[1::2]), dtype=torch.float32),
    ),
    _backward_flops,
    lambda _, grads, h, factors, places, *__: 2 * pairs_layout(factors, places, len(grads[0]), grads).backward,
)
TRAINED_PAIRS_OF_A = define(
    f"trained_pairs_of_a(Tensor u, Tensor x, {_PAIRS}) -> Tensor",
    trained_pairs_of_a,
    lambda u, _, factors, __: u.new_empty(sum(A.numel() for A in factors[::2]), dtype=torch.float32),
    lambda u, x, factors, places, **_: sum(2 * times * width for times, width, _ in _sizes(factors, places)),
    lambda u, x, factors, places: 2 * pairs_layout(factors, places, len(x), None).interleaved,
)

"""A decoder block with pairs, forward and backward in one call each (trained_block.c).

Its kernels are those of the parts by themselves, in their order: results and gradients are the same to the last bit. What one
call saves is the asking, some 45 times a block, for each of which Python finds its objects no longer in the processor's caches.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import trained_pairs
from lorakeet.kernels.cpu.operators import AttentionShape, loaded, pointers
from lorakeet.kernels.cpu.stored import NUMBERS, StoredWeight
from lorakeet.kernels.cpu.workspace import ROOMS, address, room

LAYERS = 7  # q, k, v, o, gate, up, down
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # those that see the same x
FORWARD, BACKWARD, ALONE = range(3)  # passes, as trained_block.c has them

_Layers, _Biases = ctypes.c_int64 * (LAYERS * NUMBERS), ctypes.c_void_p * 3
_Pointers, _Floats = ctypes.c_void_p * 2, ctypes.c_float * 2
Place = tuple[tuple[int, ...], tuple[int, ...], int]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """Theirs, and none of those that are none."""
    return [None if each is None else pointers(each)[0].value for each in tensors]


class _Weights(ctypes.Structure):
    _fields_ = (
        ("layers", _Layers),
        ("biases", _Biases),
        *((name, _Pointers) for name in ("heads", "norms")),
        *((name, _Floats) for name in ("epsilons", "head_epsilons")),
        *((name, ctypes.c_int64) for name in ("hidden", "inner")),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pairs", "scales")),
        *((name, ctypes.c_int64) for name in ("count", "numbers", "forward", "backward", "woven", "of_a", "of_b")),
    )


@dataclass(frozen=True)
class Weights:
    """The seven weights, by LAYERS, biases of q, k and v, gain and ε of the norms of q's and k's heads, and those of both norms.

    They are those of a moment: what takes a tensor's place in its module afterwards is nothing to a pass that has begun.
    """

    layers: Sequence[StoredWeight]
    biases: Sequence[Tensor | None]
    heads: Sequence[tuple[Tensor, float]]  # none, or both
    norms: Sequence[tuple[Tensor, float]]

    def told(self) -> Any:
        """What C is told of them, addresses, which hold nothing; ValueError for biases and gains that it cannot read so."""
        inner, hidden = self.layers[4][1:3]
        layers = _Layers(*[number for layer in self.layers for number in layer.numbers])
        heads, norms = (_addresses([gain for gain, _ in of]) for of in (self.heads, self.norms))
        epsilons, of_heads = (_Floats(*[epsilon for _, epsilon in of]) for of in (self.norms, self.heads))
        gains = _Biases(*_addresses(self.biases)), _Pointers(*heads), _Pointers(*norms)
        return _Weights(layers, *gains, epsilons, of_heads, hidden, inner)

    def held(self) -> list[Tensor]:
        """The tensors that C is told of, which are to be held as long as it may read them."""
        gains = [gain for gain, _ in (*self.heads, *self.norms)]
        biases = [bias for bias in self.biases if bias is not None]
        return [*gains, *biases, *(each for layer in self.layers for each in layer.held)]


class Pairs:
    """The pairs of a block's layers, all at the same places: the rows start … stop − 1, with a scale for each layer.

    `factors` are A and B by turns, place by place and, within a place, by LAYERS. Of them it has the addresses, and holds none.
    """

    def __init__(self, factors: Sequence[Tensor], rows: Sequence[tuple[int, int]], scales: Sequence[float], tokens: int) -> None:
        """ValueError where C cannot read them so."""
        shapes = trained_pairs.shapes_of(factors)
        self._groups = (_Group * len(GROUPS))()
        self._held: list[Any] = []  # what C is pointed to, beside the factors
        lie, self._places = _lie(shapes, tuple(rows), tokens), _places(shapes, tuple(rows), tokens)
        for told, (numbers, laid, of_a, of_b) in zip(self._groups, lie, strict=True):
            own = [factor for number in numbers for factor in factors[2 * number : 2 * number + 2]]
            held = laid.told(own), laid.scaled([scales[number] for number in numbers])
            self._held += held
            told.pairs, told.scales = (each.buffer_info()[0] for each in held)
            told.count, told.numbers, told.forward = len(numbers), laid.numbers, laid.forward
            told.backward, told.woven, told.of_a, told.of_b = laid.backward, laid.woven, of_a, of_b

    def told(self) -> Any:
        """What C is told of them."""
        return ctypes.byref(self._groups)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Room for those of all A's, and of all B's, in fp32."""
        return torch.empty(sum(told.of_a for told in self._groups)), torch.empty(sum(told.of_b for told in self._groups))

    def cut(self, found: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The gradients of the factors, in their order: views of what the backward pass found."""
        return [found[number % 2].as_strided(*place) for number, place in enumerate(self._places)]


@lru_cache(maxsize=8)  # all blocks of a pass ask for the same
def _lie(
    shapes: tuple[tuple[int, ...], ...], rows: tuple[tuple[int, int], ...], tokens: int
) -> list[tuple[list[int], trained_pairs.Laid, int, int]]:
    """Of each of GROUPS the numbers of its pairs, in the order of their gradients, how their products lie, and how many numbers
    all A's and all B's have; ValueError for pairs that do not fit the tokens."""
    found = []
    for layers in GROUPS:
        numbers = [LAYERS * place + layer for place in range(len(rows)) for layer in layers]
        own = tuple([shape for number in numbers for shape in shapes[2 * number : 2 * number + 2]])
        places = tuple([n for start, stop in rows for layer in range(len(layers)) for n in (start, stop, layer)])
        laid = trained_pairs.laid_by(own, places, None, tokens, own[0][1])
        of_a, of_b = (sum(map(math.prod, own[first::2])) for first in (0, 1))
        found.append((numbers, laid, of_a, of_b))
    return found


@lru_cache(maxsize=8)
def _places(shapes: tuple[tuple[int, ...], ...], rows: tuple[tuple[int, int], ...], tokens: int) -> list[Place]:
    """Shape, strides and first number of each factor's gradient among those of all A's, or of all B's."""
    found: list[Place] = [((0,), (0,), 0)] * len(shapes)
    for which in (0, 1):
        first = 0
        for pair in [pair for pairs, *_ in _lie(shapes, rows, tokens) for pair in pairs]:
            shape = shapes[2 * pair + which]
            found[2 * pair + which] = shape, (shape[1], 1), first
            first += math.prod(shape)
    return found


@dataclass(frozen=True)
class BlockCall:
    """A block over the tokens of a batch: what C is told of its weights, how their rows lie, and the pairs.

    `held` are tensors that hold all numbers that C is told of, those of the `factors` too, whatever takes their place.
    """

    weights: Any
    shape: AttentionShape
    pairs: Pairs
    factors: Sequence[Tensor]
    held: Sequence[Tensor]

    @cached_property
    def _told(self) -> tuple[Any, Any, Any]:
        return ctypes.byref(self.weights), ctypes.byref(self.shape), self.pairs.told()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, alone: bool = False) -> tuple[Tensor, Tensor]:
        """y of x (tokens, hidden), and what `backward` wants, unless the pass is `alone`; cos and sin are (tokens, d)."""
        told, threads, which = self._told, torch.get_num_threads(), ALONE if alone else FORWARD
        kept, y = ROOMS.take(int(loaded().trained_block_kept(*told, which))), torch.empty_like(x)
        scratch = room(int(loaded().trained_block_scratch(*told, which, threads)))
        given = *pointers(cos, sin, x, y), address(kept)
        loaded().trained_block(*told, *given, address(scratch), which, threads)
        return y, kept

    def backward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kept: Tensor, grad: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """∂L/∂x, if it is wanted, and the gradients of the factors, from ∂L/∂y (tokens, hidden). Uses up what was `kept`."""
        told, threads = self._told, torch.get_num_threads()
        grad_x, found = torch.empty_like(x) if wants_x else None, self.pairs.gradients()
        scratch = room(int(loaded().trained_block_scratch(*told, BACKWARD, threads)))
        to = ctypes.c_void_p(None if grad_x is None else grad_x.data_ptr())
        given = *pointers(cos, sin, x), address(kept), *pointers(grad), to, *pointers(*found, dtype=torch.float32)
        loaded().trained_block_backward(*told, *given, address(scratch), threads)
        return grad_x, self.pairs.cut(found)

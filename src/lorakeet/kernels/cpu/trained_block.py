"""A decoder block with pairs, forward and backward in one call each (trained_block.c).

It runs the kernels of the separate parts in their order: results and gradients are the same to the last bit. One call saves some
45 Python calls a block, each of which would miss the processor's caches.
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

from lorakeet.kernels.cpu import attention, operators, trained_pairs
from lorakeet.kernels.cpu.attention import AttentionShape
from lorakeet.kernels.cpu.operators import loaded, pointers
from lorakeet.kernels.cpu.stored import NUMBERS, StoredWeight
from lorakeet.kernels.cpu.workspace import WORKSPACES, address, aligned_bytes

NEEDS = "packed rows, plain pairs on all seven layers, no hooks"
LAYERS = 7  # q, k, v, o, gate, up, down
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # layers that share their input
FORWARD, BACKWARD, ALONE = range(3)  # kinds of pass, as in trained_block.c

_Layers, _Biases = ctypes.c_int64 * (LAYERS * NUMBERS), ctypes.c_void_p * 3
_Pointers, _Floats = ctypes.c_void_p * 2, ctypes.c_float * 2
Place = tuple[tuple[int, ...], tuple[int, ...], int]


def takes(x: Tensor, head: int, rows: Sequence[int], prefix: int) -> bool:
    """True for states (1, tokens, hidden) that C can read, with heads and rows of which it computes the attention."""
    return type(x) in operators.READ and operators.takes((x,)) and attention.takes(x, 1, 1, head, rows, prefix)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """Addresses of the tensors; None for None."""
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
        *((name, ctypes.c_int64) for name in ("count", "numbers", "forward", "backward", "interleaved", "of_a", "of_b")),
    )


@dataclass(frozen=True)
class Weights:
    """The seven weights (by LAYERS), biases of q, k and v, gain and ε of the norms of q's and k's heads, and of both norms.

    They are a snapshot: replacing a module's tensor later does not affect a pass that has started.
    """

    layers: Sequence[StoredWeight]
    biases: Sequence[Tensor | None]
    heads: Sequence[tuple[Tensor, float]]  # empty, or both
    norms: Sequence[tuple[Tensor, float]]

    def as_struct(self) -> Any:
        """The weights as C reads them: addresses, which keep nothing alive. ValueError for what C cannot read."""
        inner, hidden = self.layers[4][1:3]
        layers = _Layers(*[number for layer in self.layers for number in layer.numbers])
        heads, norms = (_addresses([gain for gain, _ in of]) for of in (self.heads, self.norms))
        epsilons, of_heads = (_Floats(*[epsilon for _, epsilon in of]) for of in (self.norms, self.heads))
        gains = _Biases(*_addresses(self.biases)), _Pointers(*heads), _Pointers(*norms)
        return _Weights(layers, *gains, epsilons, of_heads, hidden, inner)

    def owners(self) -> list[Tensor]:
        """The tensors whose memory C reads, to be kept alive as long as it may."""
        gains = [gain for gain, _ in (*self.heads, *self.norms)]
        biases = [bias for bias in self.biases if bias is not None]
        return [*gains, *biases, *(each for layer in self.layers for each in layer.owners)]


class Pairs:
    """The pairs of a block's layers, all on the same spans: rows start … stop − 1, with a scale for each layer.

    `factors` are A and B alternating, span by span and, within a span, by LAYERS. Only their addresses are stored.
    """

    def __init__(self, factors: Sequence[Tensor], rows: Sequence[tuple[int, int]], scales: Sequence[float], tokens: int) -> None:
        """ValueError where C cannot read them."""
        shapes = trained_pairs.shapes_of(factors)
        self._groups = (_Group * len(GROUPS))()
        self._held: list[Any] = []  # memory that C points to, beside the factors
        lie, self._places = _lie(shapes, tuple(rows), tokens), _places(shapes, tuple(rows), tokens)
        for group, (numbers, laid, of_a, of_b) in zip(self._groups, lie, strict=True):
            own = [factor for number in numbers for factor in factors[2 * number : 2 * number + 2]]
            owners = laid.as_array(own), laid.scaled([scales[number] for number in numbers])
            self._held += owners
            group.pairs, group.scales = (each.buffer_info()[0] for each in owners)
            group.count, group.numbers, group.forward = len(numbers), laid.numbers, laid.forward
            group.backward, group.interleaved, group.of_a, group.of_b = laid.backward, laid.interleaved, of_a, of_b

    def as_struct(self) -> Any:
        """The pairs as C reads them."""
        return ctypes.byref(self._groups)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Memory for the gradients of all A's, and of all B's, in fp32."""
        return torch.empty(sum(group.of_a for group in self._groups)), torch.empty(sum(group.of_b for group in self._groups))

    def cut(self, found: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The gradients of the factors, in their order: views of the backward pass's result."""
        return [found[number % 2].as_strided(*place) for number, place in enumerate(self._places)]


@lru_cache(maxsize=8)  # shared by all blocks of a pass
def _lie(
    shapes: tuple[tuple[int, ...], ...], rows: tuple[tuple[int, int], ...], tokens: int
) -> list[tuple[list[int], trained_pairs.PairsLayout, int, int]]:
    """For each of GROUPS: its pairs' numbers in the order of their gradients, the layout of their products, and the numbers of
    elements of all A's and of all B's. ValueError for pairs that do not fit the tokens."""
    found = []
    for layers in GROUPS:
        numbers = [LAYERS * place + layer for place in range(len(rows)) for layer in layers]
        own = tuple([shape for number in numbers for shape in shapes[2 * number : 2 * number + 2]])
        places = tuple([n for start, stop in rows for layer in range(len(layers)) for n in (start, stop, layer)])
        laid = trained_pairs.cached_layout(own, places, None, tokens, own[0][1])
        of_a, of_b = (sum(map(math.prod, own[first::2])) for first in (0, 1))
        found.append((numbers, laid, of_a, of_b))
    return found


@lru_cache(maxsize=8)
def _places(shapes: tuple[tuple[int, ...], ...], rows: tuple[tuple[int, int], ...], tokens: int) -> list[Place]:
    """Shape, strides and offset of each factor's gradient among those of all A's, or of all B's."""
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
    """A block over the tokens of a batch: its weights, its rows and its pairs, as C reads them.

    `owners` keeps all their numbers alive, including the `factors`', whatever replaces them in their modules.
    """

    weights: Any
    shape: AttentionShape
    pairs: Pairs
    factors: Sequence[Tensor]
    owners: Sequence[Tensor]

    @cached_property
    def _arguments(self) -> tuple[Any, Any, Any]:
        return ctypes.byref(self.weights), ctypes.byref(self.shape), self.pairs.as_struct()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, alone: bool = False) -> tuple[Tensor, Tensor]:
        """y of x (tokens, hidden), and what `backward` needs (empty if `alone`); cos and sin are (tokens, d)."""
        arguments, threads, which = self._arguments, torch.get_num_threads(), ALONE if alone else FORWARD
        kept, y = WORKSPACES.take(int(loaded().trained_block_saved(*arguments, which))), torch.empty_like(x)
        scratch = aligned_bytes(int(loaded().trained_block_scratch(*arguments, which, threads)))
        given = *pointers(cos, sin, x, y), address(kept)
        loaded().trained_block(*arguments, *given, address(scratch), which, threads)
        return y, kept

    def backward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kept: Tensor, grad: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """∂L/∂x, if wanted, and the gradients of the factors, from ∂L/∂y (tokens, hidden). Overwrites what was saved."""
        arguments, threads = self._arguments, torch.get_num_threads()
        grad_x, found = torch.empty_like(x) if wants_x else None, self.pairs.gradients()
        scratch = aligned_bytes(int(loaded().trained_block_scratch(*arguments, BACKWARD, threads)))
        to = ctypes.c_void_p(None if grad_x is None else grad_x.data_ptr())
        given = *pointers(cos, sin, x), address(kept), *pointers(grad), to, *pointers(*found, dtype=torch.float32)
        loaded().trained_block_backward(*arguments, *given, address(scratch), threads)
        return grad_x, self.pairs.cut(found)

"""A decoder block over new tokens and a cache of earlier ones, in one call (block.c)."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.kernels.cpu.inference_pairs import Shares
from lorakeet.kernels.cpu.operators import HEAD, LANES, in_use, loaded, pointers
from lorakeet.kernels.cpu.panels import Panels, Product

LAYERS = 7  # of a block: q, k, v, o, gate, up, down
NEEDS = "layers packed by panels.c, silu, whole heads"


def takes(x: Tensor) -> bool:
    """True for states (tokens, hidden) whose numbers C can read."""
    return type(x) is Tensor


class _Heads(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in ("heads", "kv", "d")), ("scale", ctypes.c_float))


class _BlockArguments(ctypes.Structure):
    _fields_ = (
        *(("inward", Product * 3), ("outward", Product), ("apart", Product * 2), ("down", Product)),
        *(("norms", ctypes.c_void_p * 2), ("epsilons", ctypes.c_float * 2)),
        *((name, ctypes.c_int64) for name in ("hidden", "inner")),
        ("heads", _Heads),
    )


class _NewTokens(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots", "positions")),
        *((name, ctypes.c_int64) for name in ("count", "longest", "capacity")),
    )


class BlockPairs(ctypes.Structure):
    """The pairs of the tokens on the layers of a block."""

    _fields_ = (("shares", ctypes.c_void_p), ("count", ctypes.c_int64), ("numbers", ctypes.c_int64 * LAYERS))

    @classmethod
    def of(cls, shares: Shares | None, numbers: Sequence[int | None]) -> BlockPairs:
        """`numbers` are the copies' numbers of the layers, in the order of BlockParts; None for a layer without pairs."""
        found = (ctypes.c_int64 * LAYERS)(*(-1 if number is None else number for number in numbers))
        pairs = cls(None, 0, found) if shares is None else cls(shares.address, shares.count, found)
        pairs.owner = shares
        return pairs


NO_PAIRS = BlockPairs.of(None, [None] * LAYERS)


class NewTokens:
    """The slot and the position of each token of a step in a KV cache, and the workspace that blocks share."""

    def __init__(self, slots: Sequence[int], positions: Sequence[int], capacity: int) -> None:
        """ValueError for positions beyond a slot's `capacity`, and for negative slots."""
        if len(slots) != len(positions) or min(slots) < 0 or not 0 <= min(positions) <= max(positions) < capacity:
            raise ValueError(f"slots {list(slots)} and positions {list(positions)} do not fit slots of {capacity} tokens")
        array = ctypes.c_int64 * len(slots)
        self.count, self.slots, self.capacity = len(slots), max(slots) + 1, capacity
        self._places = array(*slots), array(*positions)
        addresses = (ctypes.addressof(places) for places in self._places)
        self._shape = _NewTokens(None, None, *addresses, len(slots), max(positions) + 1, capacity)
        self._turn: tuple[Tensor, Tensor] | None = None
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def turned_by(self, turn: tuple[Tensor, Tensor]) -> _NewTokens:
        """The arguments for C, with cos and sin of each token's position (1, tokens, d)."""
        if self._turn is not turn:
            cos, sin = (each.bfloat16().contiguous() for each in turn)
            self._shape.cos, self._shape.sin = cos.data_ptr(), sin.data_ptr()
            self._turn, self._kept = turn, (cos, sin)
        return self._shape

    @property
    def longest(self) -> int:
        """The most keys that a token attends to."""
        return int(self._shape.longest)

    def workspace(self, size: int) -> int:
        """The address of a workspace of at least `size` bytes."""
        if len(self._workspace) < size:
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace.data_ptr()


@dataclass(frozen=True)
class BlockParts:
    """What a block computes with: norms (hidden,) and their ε; weights and biases of q, k, v, o, gate, up and down."""

    norms: tuple[Tensor, Tensor]
    epsilons: tuple[float, float]
    weights: tuple[Panels, ...]
    biases: tuple[Tensor | None, ...]
    head: int
    scale: float

    @property
    def fit(self) -> bool:
        """True if the C block supports these shapes, dtypes and layouts."""
        if not all(isinstance(weight, Panels) for weight in self.weights):
            return False
        q, k, v, o, gate, up, down = (weight.shape for weight in self.weights)
        (hidden,) = self.norms[0].shape
        given = [*self.norms, *(bias for bias in self.biases if bias is not None)]
        plain = all(x.dtype == torch.bfloat16 and x.is_contiguous() and x.device.type == "cpu" for x in given)
        chained = {q[1], k[1], v[1], o[0], gate[1], up[1], down[0], *self.norms[1].shape} == {hidden}
        chained = chained and k == v and o[1] == q[0] and gate == up and down[1] == gate[0]
        whole = self.head % HEAD == 0 and q[0] % k[0] == 0 and k[0] % self.head == 0
        return plain and chained and whole and hidden % LANES == 0 and gate[0] % LANES == 0 and in_use()


class Block:
    """The arguments of the C block: addresses of the parts' numbers."""

    def __init__(self, parts: BlockParts) -> None:
        """`parts` must be `fit`."""
        self.parts = parts
        q, k, _, _, gate, _, down = (weight.shape[0] for weight in parts.weights)
        columns = (0, q, q + k, 0, 0, gate, 0)
        products = [
            Product(weight.numbers.data_ptr(), None if bias is None else bias.data_ptr(), weight.shape[0], column)
            for weight, bias, column in zip(parts.weights, parts.biases, columns, strict=True)
        ]
        norms, epsilons = (ctypes.c_void_p * 2)(*(norm.data_ptr() for norm in parts.norms)), (ctypes.c_float * 2)(*parts.epsilons)
        heads = _Heads(q // parts.head, k // parts.head, parts.head, parts.scale)
        inward, apart = (Product * 3)(*products[:3]), (Product * 2)(*products[4:6])
        self._shape = _BlockArguments(inward, products[3], apart, products[6], norms, epsilons, down, gate, heads)
        self.hidden, self.cached = down, (k // parts.head, parts.head)
        given = [*parts.norms, *(bias for bias in parts.biases if bias is not None)]
        # aliases keep the numbers alive if the tensors get others
        self._given = [(each, each.detach(), each.data_ptr()) for each in given]

    @property
    def moved(self) -> bool:
        """True if a norm or a bias has been given other memory since."""
        return any(each.data_ptr() != address for each, _, address in self._given)

    def __deepcopy__(self, memo: dict[int, object]) -> Block:
        """A block over copies of the parts."""
        return Block(copy.deepcopy(self.parts, memo))

    def forward(
        self, x: Tensor, pairs: BlockPairs, new: NewTokens, turn: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x (tokens, hidden) to the same, each token with its `pairs`.

        `cache` are the cached keys and values (slots, kv, capacity, d). Those of the `new` tokens, the first of x, are written to
        them; the other tokens attend to nothing. `turn` are cos and sin (1, tokens, d). ValueError for shapes and layouts that do
        not fit.
        """
        keys, values = cache
        kv, head = self.cached
        states = (x.shape[1:] == (self.hidden,), keys.shape == values.shape, keys.shape[1:] == (kv, new.capacity, head),
                  new.count <= len(x), new.slots <= len(keys), turn[0].shape == turn[1].shape == (1, len(x), head))  # fmt: skip
        plain = (each.dtype == torch.bfloat16 and each.is_contiguous() and each.is_cpu for each in (x, keys, values))
        if not (all(states) and all(plain)):
            sizes = f"x {tuple(x.shape)} and a cache of {tuple(keys.shape)}"
            raise ValueError(f"{sizes} do not fit this block, which takes contiguous bf16 on the CPU")
        library, threads, y = loaded(), torch.get_num_threads(), torch.empty_like(x)
        tokens, block = ctypes.c_int64(len(x)), ctypes.byref(self._shape)
        size = library.block_scratch(block, tokens, ctypes.c_int64(new.longest), threads)
        shapes = block, ctypes.byref(pairs), ctypes.byref(new.turned_by(turn))
        library.block(*shapes, *pointers(x, y, keys, values), tokens, ctypes.c_void_p(new.workspace(size)), threads)
        return y

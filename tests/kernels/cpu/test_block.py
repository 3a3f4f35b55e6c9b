"""A whole block over new tokens and a cache, against the same formulas in double precision; what it refuses."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.block import NO_PAIRS, Block, BlockPairs, BlockParts, NewTokens
from lorakeet.kernels.cpu.inference_pairs import PairLayout, Shares
from lorakeet.kernels.cpu.panels import Panels
from tiny.native import needs_native

pytestmark = needs_native

SLOTS, CAPACITY, EPSILON = 6, 70, 1e-5
# heads of queries and of keys, their size, the widths of x and of the MLP
SHAPES = [(3, 1, 64, 48, 80), (4, 4, 64, 64, 32), (10, 2, 128, 96, 160), (5, 1, 64, 32, 16), (8, 1, 64, 64, 64)]
SHAPES += [(1, 1, 64, 256, 64)]  # wider without its parts than within
# slot, tokens that it holds already, new ones: prompts, a prompt that goes on, and rows that write one token
ROWS = [(4, 0, 5), (0, 0, 1), (2, 33, 1), (1, 12, 40), (5, 69, 1)]


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def parts_of(shape: tuple[int, int, int, int, int], *, biased: bool) -> tuple[BlockParts, list[Tensor]]:
    heads, kv, d, hidden, inner = shape
    outs = [heads * d, kv * d, kv * d, hidden, inner, inner, hidden]
    ins = [hidden, hidden, hidden, heads * d, hidden, hidden, inner]
    weights = [random(out, width, seed=place, size=width**-0.5) for place, (out, width) in enumerate(zip(outs, ins, strict=True))]
    biases = tuple(random(out, seed=20 + place) if biased else None for place, out in enumerate(outs))
    norms = random(hidden, seed=30), random(hidden, seed=31)
    return BlockParts(norms, (EPSILON, EPSILON), tuple(map(Panels, weights)), biases, d, d**-0.5), weights


def turns(positions: list[int], d: int) -> tuple[Tensor, Tensor]:
    angles = torch.tensor(positions)[:, None] / 50 ** (torch.arange(d // 2) / d)
    both = torch.cat([angles, angles], dim=1)[None]
    return both.cos().bfloat16(), both.sin().bfloat16()


def written_out(parts: BlockParts, weights: list[Tensor], x: Tensor, cache: list[Tensor], turn: Any) -> Tensor:
    """The block in double precision, token by token; `cache` are keys and values (slots, kv, capacity, d)."""
    q, k, v, o, gate, up, down = (
        (lambda states, w=weight, b=bias: states @ w.double().T + (0 if b is None else b.double()))
        for weight, bias in zip(weights, parts.biases, strict=True)
    )

    def normed(states: Tensor, which: int) -> Tensor:
        return states / (states.square().mean() + EPSILON).sqrt() * parts.norms[which].double()

    def turned(states: Tensor, place: int) -> Tensor:
        cos, sin = (each[0, place].double() for each in turn)
        a, b = states.chunk(2, dim=1)
        return states * cos + torch.cat([-b, a], dim=1) * sin

    keys, values = (each.double() for each in cache)
    found, place = [], 0
    for slot, held, new in ROWS:
        for position in range(held, held + new):
            token = x[place].double()
            h = normed(token, 0)
            keys[slot, :, position] = turned(k(h).view(-1, parts.head), place)
            values[slot, :, position] = v(h).view(-1, parts.head)
            query = turned(q(h).view(-1, parts.head), place)
            group = len(query) // keys.shape[1]
            seen = [each[slot, :, : position + 1].repeat_interleave(group, dim=0) for each in (keys, values)]
            shares = torch.einsum("hd,hpd->hp", query, seen[0]).mul(parts.scale).softmax(-1)
            token = token + o(torch.einsum("hp,hpd->hd", shares, seen[1]).flatten())
            h = normed(token, 1)
            found.append(token + down(nn.functional.silu(gate(h)) * up(h)))
            place += 1
    return torch.stack(found)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_is_what_its_formulas_say(shape: tuple[int, int, int, int, int], biased: bool) -> None:
    parts, weights = parts_of(shape, biased=biased)
    assert parts.fit
    _, kv, d, hidden, _ = shape
    slots = [slot for slot, _, new in ROWS for _ in range(new)]
    positions = [held + place for _, held, new in ROWS for place in range(new)]
    tokens, filler = len(slots), 3
    x, turn = random(tokens + filler, hidden, seed=40), turns(positions + [0] * filler, d)
    cache = [random(SLOTS, kv, CAPACITY, d, seed=50 + which) for which in range(2)]
    cache[0][3] = cache[1][3] = float("nan")  # of a sequence that nobody writes
    cache[0][0, :, 1:] = cache[1][0, :, 1:] = float("nan")  # behind the end of one
    before = [each.clone() for each in cache]
    found = Block(parts).forward(x, NO_PAIRS, NewTokens(slots, positions, CAPACITY), turn, (cache[0], cache[1]))
    exact = written_out(parts, weights, x, before, turn)
    assert found.shape == x.shape and found.dtype == torch.bfloat16
    assert float((found[:tokens].double() - exact).norm() / exact.norm()) < 0.008  # rounded to 8 bits a dozen times
    written = torch.zeros(SLOTS, CAPACITY, dtype=torch.bool)
    written[slots, positions] = True
    for ours, held in zip(cache, before, strict=True):
        left, found = (each.masked_fill(written[:, None, :, None], 0).nan_to_num(7) for each in (held, ours))
        assert torch.equal(left, found), "only the places of the new tokens are written"


def computed(parts: BlockParts, x: Tensor, slots: list[int], positions: list[int], cache: list[Tensor]) -> Tensor:
    new, turn = NewTokens(slots, positions, CAPACITY), turns(positions, parts.head)
    return Block(parts).forward(x, NO_PAIRS, new, turn, (cache[0], cache[1]))


@pytest.mark.parametrize("shape", [(3, 1, 64, 96, 64), (1, 1, 64, 256, 64)])
def test_each_token_has_its_own_pairs(shape: tuple[int, int, int, int, int]) -> None:
    """Of an odd rank, on some layers only, for more tokens than are multiplied together; others have none."""
    parts, weights = parts_of(shape, biased=True)
    _, kv, d, hidden, _ = shape
    shapes = [tuple(weight.shape) for weight in weights]
    on, rank, scale = (0, 2, 3, 5, 6), 3, 1.5
    pairs = {layer: (random(rank, shapes[layer][1], seed=60 + layer, size=shapes[layer][1] ** -0.5),
                     random(shapes[layer][0], rank, seed=70 + layer)) for layer in on}  # fmt: skip
    layout = PairLayout([(layer, rank, torch.bfloat16, torch.bfloat16) for layer in on], shapes)
    memory = torch.empty(layout.bytes, dtype=torch.uint8)
    layout.copy([(*pairs[layer], scale) for layer in on], memory)
    with_pairs, filler = [0, 1, 2, 4, 5, 7, 8], 2
    shares = Shares([(with_pairs, layout.at(memory))])
    tokens, slots = 9, list(range(9))
    x, turn = random(tokens + filler, hidden, seed=80), turns([0] * (tokens + filler), d)

    def forward(block: BlockParts, held: BlockPairs) -> Tensor:
        cache = [torch.zeros(tokens, kv, CAPACITY, d).bfloat16() for _ in range(2)]
        return Block(block).forward(x, held, NewTokens(slots, [0] * tokens, CAPACITY), turn, (cache[0], cache[1]))

    found = forward(parts, BlockPairs.of(shares, [layer if layer in on else None for layer in range(7)]))
    merged = [
        (weight.double() + scale * pairs[layer][1].double() @ pairs[layer][0].double()).bfloat16() if layer in on else weight
        for layer, weight in enumerate(weights)
    ]
    expected, bare = forward(replace(parts, weights=tuple(map(Panels, merged))), NO_PAIRS), forward(parts, NO_PAIRS)
    without = [token for token in range(tokens + filler) if token not in with_pairs]
    assert torch.equal(found[without], bare[without])
    close, far = ((found - other)[with_pairs].float().norm() / found[with_pairs].float().norm() for other in (expected, bare))
    assert float(close) < 0.02
    assert float(far) > 0.2


def test_a_token_gets_the_same_bits_beside_any_others() -> None:
    parts, _ = parts_of(SHAPES[0], biased=True)
    slots, positions = [0, 3, 1, 5, 2], [7, 40, 0, 22, 69]
    x = random(5, 48, seed=1)
    cache = [random(SLOTS, 1, CAPACITY, 64, seed=2 + which) for which in range(2)]
    together = computed(parts, x, slots, positions, [each.clone() for each in cache])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for token in range(5):
                one = slice(token, token + 1)
                assert torch.equal(computed(parts, x[one], slots[one], positions[one], [c.clone() for c in cache]), together[one])
    finally:
        torch.set_num_threads(before)


def test_numbers_that_are_none_stay_in_their_row() -> None:
    parts, _ = parts_of(SHAPES[0], biased=False)
    x, cache = random(3, 48, seed=1), [torch.zeros(SLOTS, 1, CAPACITY, 64).bfloat16() for _ in range(2)]
    x[1, 3] = float("inf")
    found = computed(parts, x, [0, 1, 2], [0, 0, 0], cache)
    assert bool(found[1].isnan().all()) and bool(found[[0, 2]].isfinite().all())


def test_a_copy_of_a_block_has_weights_of_its_own() -> None:
    parts, _ = parts_of(SHAPES[0], biased=True)
    block, x = Block(parts), random(1, 48, seed=1)
    other = deepcopy(block)
    cache = [torch.zeros(SLOTS, 1, CAPACITY, 64).bfloat16() for _ in range(2)]
    given = NO_PAIRS, NewTokens([0], [0], CAPACITY), turns([0], 64), (cache[0], cache[1])
    before = block.forward(x, *given)
    for weight in block.parts.weights:
        weight.numbers.zero_()
    for given_to_both in (*block.parts.norms, *block.parts.biases):
        assert given_to_both is not None
        given_to_both.zero_()
    assert torch.equal(other.forward(x, *given), before) and not torch.equal(block.forward(x, *given), before)


def test_what_does_not_fit_is_refused() -> None:
    parts, _ = parts_of(SHAPES[0], biased=False)
    assert parts.fit
    for norms in ((parts.norms[0].float(), parts.norms[1]), (parts.norms[0][:32], parts.norms[1])):
        assert not replace(parts, norms=norms).fit
    assert not replace(parts, head=32).fit
    assert not replace(parts, weights=(*parts.weights[:6], parts.weights[0])).fit
    with operators.torch_only():
        assert not parts.fit
    cache = [torch.zeros(SLOTS, 1, CAPACITY, 64).bfloat16() for _ in range(2)]
    wrong: list[dict[str, Any]] = [
        {"x": random(2, 48, seed=1)}, {"x": random(1, 32, seed=1)}, {"x": random(1, 48, seed=1).float()}, {"slots": [SLOTS]},
        {"cache": [each.float() for each in cache]}, {"cache": [each[:, :, :8] for each in cache]},
    ]  # fmt: skip
    for change in wrong:
        given = {"x": random(1, 48, seed=1), "slots": [0], "positions": [0], "cache": cache} | change
        with pytest.raises(ValueError, match="do not fit this block"):
            computed(parts, **given)
    for slots, positions in (([0, 0], [0, CAPACITY]), ([0, -1], [0, 0]), ([0, 0], [0]), ([0], [-1])):
        with pytest.raises(ValueError, match="do not fit slots of 70 tokens"):
            NewTokens(slots, positions, CAPACITY)

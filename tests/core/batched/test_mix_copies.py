"""Copies of mixes on all layers: the numbers of core/batched/stack, one copying for each mix that comes, and bounded memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from random import Random
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.batched.mix_copies import MixCopies
from lorakeet.core.dora import DoraPair
from lorakeet.core.layers.linear import LoraLinear, SharedInput
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.core.selection import PATIENCE, Selection, Share
from lorakeet.kernels.cpu import inference_pairs
from lorakeet.kernels.cpu.inference_pairs import PairLayout
from lorakeet.kernels.cpu.operators import torch_only
from tiny.native import needs_native

pytestmark = needs_native

WIDTH, OUTS, TOKENS = 32, (48, 48, 16), 9
RANKS = {"a": 4, "b": 3, "c": 6, "d": 3}


def pair(name: str, out: int, kind: type[LoraPair] = LoraPair) -> LoraPair:
    entry = PlanEntry(path="w", kind="linear", shape=(out, WIDTH), rank=RANKS[name], alpha=2.0)
    made, generator = kind(entry).eval(), torch.Generator().manual_seed(ord(name) + out)
    with torch.no_grad():
        made.A.normal_(generator=generator)
        made.B.normal_(generator=generator)
    return made


class Model:
    """Layers that see the same x, and one that sees another."""

    def __init__(self) -> None:
        self.selection = Selection()
        generator = torch.Generator().manual_seed(0)
        self.layers = []
        for out in (*OUTS, 16):
            linear = nn.Linear(WIDTH, out).requires_grad_(False)
            for parameter in linear.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16()
            layer = LoraLinear(linear, DenseBase(linear)).eval()
            layer.selection = self.selection
            self.layers.append(layer)
        self.shared, self.alone = SharedInput(), SharedInput()
        self.x = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16()
        for name in RANKS:
            self.attach(name)

    def attach(self, name: str) -> None:
        """On all layers, but b on the second alone, which others than b have too."""
        for number, layer in enumerate(self.layers):
            if name != "b" or number == 1:
                layer.attach(name, pair(name, layer.out_features))

    @torch.no_grad()
    def step(self, *shares: Share) -> list[Tensor]:
        self.selection.divide(shares, units=TOKENS)
        return [*self.shared(self.layers[:3], self.x), *self.alone(self.layers[3:], self.x)]

    @torch.no_grad()
    def by_torch(self) -> list[Tensor]:
        with torch_only():
            return [*SharedInput()(self.layers[:3], self.x), *SharedInput()(self.layers[3:], self.x)]

    @property
    def copies(self) -> MixCopies:
        return MixCopies.of(self.selection, inference_pairs)


def texts(names: str) -> list[Share]:
    """A token for each name."""
    return [Share(token, token + 1, name) for token, name in enumerate(names)]


def near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1 / 64, atol=0.15)  # sums of up to 20, rounded once here and twice there


@pytest.fixture
def copyings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of each copying."""
    found: list[int] = []
    run = PairLayout.copy
    monkeypatch.setattr(PairLayout, "copy", lambda self, pairs, memory: (found.append(len(pairs)), run(self, pairs, memory)))
    return found


@pytest.mark.parametrize("few", [16, 2])
def test_any_mixes_give_what_a_stack_gives(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.core.selection.FEW", few)  # beyond it, tokens of one mix come as a span
    random, model = Random(few), Model()
    for _ in range(40):
        shares = [
            Share(start, start + random.randint(1, TOKENS - start), name, random.choice((1.0, 0.5, -0.25)))
            for start in random.sample(range(TOKENS), random.randint(1, 4))
            for name in random.sample("abcd", random.randint(1, 2))
        ]
        near(model.step(*shares), model.by_torch())


def test_a_mix_that_comes_is_copied_once_for_all_layers(copyings: list[int]) -> None:
    model = Model()
    model.step(*texts("abcd"))
    copyings.clear()
    model.step(*texts("abc"), Share(3, 4, "d", 0.5))
    assert copyings == [4], "another weight is another mix, with a pair on each of four layers"
    model.step(*texts("ba"), Share(3, 4, "d", 0.5))
    assert copyings == [4], "what stands is not copied"
    model.step(Share(0, 1, "b", 2.0), *texts("ba")[1:])
    assert copyings == [4, 1], "b is on one layer"
    near(model.step(Share(0, 1, "b", 2.0), *texts("ba")[1:]), model.by_torch())


def test_layers_without_a_pair_of_the_batch_are_the_bare_ones() -> None:
    model = Model()
    found = model.step(*texts("b"))
    assert torch.equal(found[3], model.layers[3].bare(model.x))
    for number, first in ((0, 0), (1, 1), (2, 0)):
        layer = model.layers[number]
        assert torch.equal(found[number][first:], layer.base.matmul(model.x).add_(layer.bias)[first:])


def test_adapters_that_come_again_leave_or_are_trained_are_looked_at_again(copyings: list[int]) -> None:
    model = Model()
    model.step(*texts("ac"))
    copyings.clear()
    with torch.no_grad():
        model.layers[0].adapters["a"].A.mul_(2)
    near(model.step(*texts("ca")), model.by_torch())
    assert copyings == [4], "a was written to"
    model.layers[1].attach("c", pair("a", 48))
    near(model.step(*texts("ca")), model.by_torch())
    assert copyings == [4, 4]
    model.selection.changed("nobody")
    model.step(*texts("ca"))
    assert copyings == [4, 4], "what comes for others is nothing to these"
    for layer in model.layers:
        layer.detach("c")
    near(model.step(*texts("ca")), model.by_torch())
    assert copyings == [4, 4, 0], "c has no pair any more"


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_pairs_that_are_more_than_a_and_b_compute_by_themselves(kind: str) -> None:
    model = Model()
    if kind == "dora":
        special = pair("a", 48, DoraPair)
        assert isinstance(special, DoraPair)
        special.measure(model.layers[0].weight.float())
    else:
        special = pair("a", 48)
        special.bias = nn.Parameter(torch.ones(48))
    model.layers[0].attach("a", special)
    near(model.step(*texts("acb")), model.by_torch())
    near(model.step(*texts("cb")), model.by_torch())
    with pytest.raises(ValueError, match="no weighted mix"):
        model.step(Share(0, 1, "a", 0.5))


def test_copies_take_what_one_batch_needed_at_most(copyings: list[int]) -> None:
    model = Model()
    model.step(*texts("ad"))
    most = model.copies.bytes
    assert most == 2 * (4 + 4) * (4 * WIDTH + sum(OUTS) + 16) == model.selection.table_bytes, "odd ranks are filled up"
    model.step(*texts("a"))
    assert model.copies.bytes == most, "d stays while nobody needs the room"
    model.step(*texts("a"), Share(1, 2, "d", 0.5))
    memory = model.copies._copies[("d", 0.5),].memory[0].data_ptr()
    model.step(*texts("a"), Share(1, 2, "d", 0.25))
    assert model.copies.bytes == most and model.copies._copies[("d", 0.25),].memory[0].data_ptr() == memory
    for number in range(PATIENCE + 1):
        model.step(*texts("b" * (1 + number % 2)))
    assert model.copies.bytes == 2 * 4 * (WIDTH + 48), "what was needed once is forgotten"
    before = model.selection.changes
    model.selection.release()
    assert model.selection.table_bytes == 0 and model.selection.changes != before
    copyings.clear()
    near(model.step(*texts("b")), model.by_torch())
    assert copyings == [1]


def test_a_copying_that_fails_leaves_nothing_that_looks_like_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = Model(), PairLayout.copy
    model.step(*texts("ab"))

    def failing(self: PairLayout, *given: Any) -> None:
        run(self, *given)
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(PairLayout, "copy", failing)
        model.step(*texts("dc"))
    assert model.copies.bytes == sum(copy.bytes for copy in model.copies._copies.values())
    near(model.step(*texts("dc")), model.by_torch())
    near(model.step(*texts("ab")), model.by_torch())


def test_a_copied_model_has_copies_of_its_own() -> None:
    model = Model()
    model.step(*texts("ac"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].adapters["a"].A.mul_(2)
    near(other.step(*texts("ac")), other.by_torch())
    near(model.step(*texts("ac")), model.by_torch())
    assert other.copies is not model.copies and other.copies.bytes == model.copies.bytes


def test_what_is_released_is_gone() -> None:
    model = Model()
    model.step(*texts("abcd"))
    memory = [weakref.ref(held) for copy in model.copies._copies.values() for held in copy.memory]
    assert memory and all(held() is not None for held in memory)
    model.selection.release()
    assert all(held() is None for held in memory), "layers and arrangements do not keep it"
    near(model.step(*texts("abcd")), model.by_torch())


def test_pairs_of_another_shape_are_refused() -> None:
    model = Model()
    held = cast(LoraPair, model.layers[0].adapters["a"])
    held.A = nn.Parameter(held.A[:, :-2].detach())
    with pytest.raises(ValueError, match="are no pair for a weight of"):
        model.step(*texts("a"))

"""`ranks.score`: gains against whole gradients and whole second moments, computed the long way."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.errors import ConfigError, DataError
from lorakeet.ranks.score import (
    LENGTH,
    OVERSAMPLING,
    Halves,
    Sketch,
    activation_directions,
    gradient_directions,
    gradient_gains,
    gradient_halves,
    non_increasing,
    sketch_plan,
    sketch_states,
    variance_gains,
)

ENTRIES = (
    PlanEntry("a", "linear", (9, 14), 4, 12.0, variant="dora", start="pissa", dropout=0.5),
    PlanEntry("b", "experts", (2, 7, 11), 4, 12.0),
)


def backward_over(pairs: dict[str, LoraPair], gradients: list[dict[str, Tensor]]) -> Callable[[int], None]:
    """The loss ⟨G, ΔW⟩ of each half: its gradient with respect to the weight is G."""

    def backward(half: int) -> None:
        sum((pairs[path].delta() * gradient).sum() for path, gradient in gradients[half].items()).backward()

    return backward


def parameters_of(pairs: dict[str, LoraPair]) -> dict[str, nn.Parameter]:
    return {f"{path}.{name}": parameter for path, pair in pairs.items() for name, parameter in pair.named_parameters()}


def measured(plan: Plan, pairs: dict[str, LoraPair], halves: list[dict[str, Tensor]]) -> Halves:
    return gradient_halves(plan, parameters_of(pairs), backward_over(pairs, halves), seed=0)


def test_where_both_halves_agree_the_gains_are_the_squared_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    plan = sketch_plan(Plan(ENTRIES), 4)
    assert [(e.rank, e.scale, e.variant, e.start, e.dropout) for e in plan.entries] == [
        (9, 1.0, "lora", "kaiming", 0.0), (7, 1.0, "lora", "kaiming", 0.0)  # rank 4 + OVERSAMPLING, cut to full rank
    ]  # fmt: skip
    assert OVERSAMPLING == 8
    pairs = {entry.path: LoraPair(entry) for entry in plan.entries}
    gradient = {"a": torch.randn(9, 14, generator=generator), "b": torch.randn(2, 7, 11, generator=generator)}
    found = gradient_gains(measured(plan, pairs, [gradient] * 2), largest=4)
    expected_a = torch.linalg.svdvals(gradient["a"])[:4].square()
    expected_b = torch.linalg.svdvals(gradient["b"]).square().sum(0)[:4]
    torch.testing.assert_close(torch.tensor(found["a"]), expected_a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found["b"]), expected_b, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in parameters_of(pairs).values())


def test_noise_that_the_other_half_does_not_share_is_worth_little() -> None:
    """Twelve equal directions of noise above a signal of rank 2: σ² alone would put the noise first."""
    generator = torch.Generator().manual_seed(0)
    plan = sketch_plan(Plan((PlanEntry("a", "linear", (40, 50), 4, 12.0),)), 10)
    signal = torch.randn(40, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    halves = [{"a": signal + 3 * torch.randn(40, 50, generator=generator)} for _ in range(2)]
    pairs = {"a": LoraPair(plan.entries[0])}
    found = gradient_gains(measured(plan, pairs, halves), largest=10)["a"]
    plain = torch.linalg.svdvals(halves[0]["a"]).square()
    assert sum(found[2:]) < 0.1 * plain[2:10].sum() and sum(found[:2]) > 0.3 * torch.linalg.svdvals(signal).square().sum()
    assert found == sorted(found, reverse=True) and len(found) == 10


def test_a_direction_of_noise_alone_is_worth_nothing_on_average() -> None:
    """Of experts too, whose gains are added up: without what is below 0 each would add its noise."""
    generator, totals = torch.Generator().manual_seed(1), []
    plan = sketch_plan(Plan((PlanEntry("a", "experts", (4, 20, 30), 4, 12.0),)), 4)
    for _ in range(40):
        halves = [{"a": torch.randn(4, 20, 30, generator=generator)} for _ in range(2)]
        totals.append(sum(gradient_gains(measured(plan, {"a": LoraPair(plan.entries[0])}, halves), largest=4)["a"]))
    found = torch.tensor(totals)
    assert found.mean().abs() < 3 * found.std() / 40**0.5 and (found < 0).sum() > 10


def test_a_matrix_that_no_token_reaches_has_no_directions() -> None:
    model, plan = Two(), Plan((PlanEntry("first", "linear", (12, 10), 4, 12.0),))
    with pytest.raises(DataError, match=r"No token of the rows reaches 'first'.*lora\.start kaiming"):
        activation_directions(sketched(model, plan, [], "input"), {"first": 4})


def test_gradients_that_are_no_numbers_give_gains_that_are_none() -> None:
    plan = sketch_plan(Plan(ENTRIES[:1]), 4)
    pairs = {"a": LoraPair(plan.entries[0])}
    halves = [{"a": torch.full((9, 14), float("nan"))}] * 2
    found = gradient_gains(measured(plan, pairs, halves), largest=4)
    assert all(math.isnan(value) for value in found["a"])


def test_gains_never_rise() -> None:
    assert non_increasing([3.0, 1.0, 2.0, 0.0]) == [3.0, 1.5, 1.5, 0.0]
    assert non_increasing([1.0, 2.0, 3.0]) == [2.0] * 3 and non_increasing([]) == []


class Two(nn.Module):
    """Two linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 12, bias=False), nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def sketched(model: Two, plan: Plan, batches: list[Tensor], of: str) -> dict[str, Sketch]:
    def forward() -> None:
        for x in batches:
            model(x)

    return sketch_states(model, plan, forward, of=of, largest=4, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("of", ["input", "output"])
def test_shares_of_second_moments(of: str) -> None:
    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(5, 7, 10) * torch.linspace(0.1, 2, 10) for _ in range(3)]
    plan = Plan((PlanEntry("first", "linear", (12, 10), 4, 12.0), PlanEntry("second", "linear", (6, 12), 4, 12.0)))
    sketches = sketched(model, plan, batches, of)
    found = variance_gains(sketches, plan, largest=4)
    x = torch.cat(batches).flatten(0, 1)
    hidden = x @ model.first.weight.t()
    states = [x, hidden] if of == "input" else [hidden, hidden @ model.second.weight.t()]
    for path, seen in zip(("first", "second"), states, strict=True):
        values = torch.linalg.svdvals(seen.detach().double()).square()
        torch.testing.assert_close(torch.tensor(found[path]).double(), (values / values.sum())[:4], rtol=1e-3, atol=1e-5)
    assert not model.first._forward_hooks and not model.second._forward_hooks


def test_a_bias_is_no_part_of_what_a_weight_gives() -> None:
    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(5, 7, 10)]
    plan = Plan((PlanEntry("first", "linear", (12, 10), 4, 12.0),))
    plain = variance_gains(sketched(model, plan, batches, "output"), plan, largest=4)["first"]
    model.first.bias = nn.Parameter(torch.full((12,), 30.0))
    biased = variance_gains(sketched(model, plan, batches, "output"), plan, largest=4)["first"]
    torch.testing.assert_close(torch.tensor(biased), torch.tensor(plain), rtol=1e-4, atol=1e-5)


def test_only_linear_layers_have_states_to_read() -> None:
    with pytest.raises(ConfigError, match=r"ranks\.score activation reads linear layers only, not 'b'.*gradient"):
        sketch_states(Two(), Plan(ENTRIES), lambda: None, of="input", largest=4, seed=0)


def test_a_start_along_the_gradient_passes_on_the_most_of_it() -> None:
    """A's rows are the leading right singular vectors of the mean gradient, as long as the rows of a random A are."""
    generator = torch.Generator().manual_seed(0)
    plan = sketch_plan(Plan((PlanEntry("a", "linear", (9, 14), 4, 12.0),)), 4)
    pairs = {"a": LoraPair(plan.entries[0])}
    halves = [{"a": torch.randn(9, 14, generator=generator)} for _ in range(2)]
    A = gradient_directions(measured(plan, pairs, halves), {"a": 3})["a"]
    both = halves[0]["a"] + halves[1]["a"]
    torch.testing.assert_close(A @ A.t(), torch.eye(3) / 3, rtol=1e-4, atol=1e-5)
    caught = (both @ A.t()).square().sum() / LENGTH**2
    torch.testing.assert_close(caught, torch.linalg.svdvals(both)[:3].square().sum(), rtol=1e-4, atol=1e-4)
    broken = [{"a": torch.full((9, 14), float("nan"))}] * 2
    with pytest.raises(DataError, match=r"states at 'a' are not finite.*lora\.start kaiming"):
        gradient_directions(measured(plan, pairs, broken), {"a": 3})


def test_a_start_along_the_inputs_holds_the_most_of_them() -> None:
    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(5, 7, 10) * torch.linspace(0.1, 2, 10) for _ in range(3)]
    plan = Plan((PlanEntry("first", "linear", (12, 10), 4, 12.0),))
    A = activation_directions(sketched(model, plan, batches, "input"), {"first": 4})["first"]
    x = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close(A @ A.t(), torch.eye(4) / 3, rtol=1e-4, atol=1e-5)
    held = 3 * (x @ A.t()).square().sum()
    torch.testing.assert_close(held, torch.linalg.svdvals(x)[:4].square().sum(), rtol=1e-3, atol=1e-3)
    narrow = [torch.randn(5, 1) @ torch.randn(1, 10)]
    A = activation_directions(sketched(model, plan, narrow, "input"), {"first": 4})["first"]
    assert (A.norm(dim=1) - LENGTH).abs().max() < 1e-4, "states of one direction: the other rows are random, not zero"
    with pytest.raises(DataError, match="not finite"):
        activation_directions(sketched(model, plan, [torch.full((2, 10), float("nan"))], "input"), {"first": 4})

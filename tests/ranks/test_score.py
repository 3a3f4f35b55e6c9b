"""`ranks.score`: gains against whole gradients and whole second moments, computed the long way."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.errors import ConfigError
from lorakeet.ranks.score import OVERSAMPLING, falling, gradient_gains, sketch_plan, variance_gains

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


def test_where_both_halves_agree_the_gains_are_the_squared_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    plan = sketch_plan(Plan(ENTRIES), 4)
    assert [(e.rank, e.scale, e.variant, e.start, e.dropout) for e in plan.entries] == [
        (9, 1.0, "lora", "kaiming", 0.0), (7, 1.0, "lora", "kaiming", 0.0)  # rank 4 + OVERSAMPLING, cut to full rank
    ]  # fmt: skip
    assert OVERSAMPLING == 8
    pairs = {entry.path: LoraPair(entry) for entry in plan.entries}
    gradient = {"a": torch.randn(9, 14, generator=generator), "b": torch.randn(2, 7, 11, generator=generator)}
    found = gradient_gains(plan, parameters_of(pairs), backward_over(pairs, [gradient] * 2), largest=4, seed=0)
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
    found = gradient_gains(plan, parameters_of(pairs), backward_over(pairs, halves), largest=10, seed=0)["a"]
    plain = torch.linalg.svdvals(halves[0]["a"]).square()
    assert sum(found[2:]) < 0.1 * plain[2:10].sum() and sum(found[:2]) > 0.3 * torch.linalg.svdvals(signal).square().sum()
    assert found == sorted(found, reverse=True) and len(found) == 10


def test_gradients_that_are_no_numbers_give_gains_that_are_none() -> None:
    plan = sketch_plan(Plan(ENTRIES[:1]), 4)
    pairs = {"a": LoraPair(plan.entries[0])}
    halves = [{"a": torch.full((9, 14), float("nan"))}] * 2
    found = gradient_gains(plan, parameters_of(pairs), backward_over(pairs, halves), largest=4, seed=0)
    assert all(math.isnan(value) for value in found["a"])


def test_gains_never_rise() -> None:
    assert falling([3.0, 1.0, 2.0, 0.0]) == [3.0, 1.5, 1.5, 0.0] and falling([1.0, 2.0, 3.0]) == [2.0] * 3 and falling([]) == []


class Two(nn.Module):
    """Two linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 12, bias=False), nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("of", ["input", "output"])
def test_shares_of_second_moments(of: str) -> None:
    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(5, 7, 10) * torch.linspace(0.1, 2, 10) for _ in range(3)]
    plan = Plan((PlanEntry("first", "linear", (12, 10), 4, 12.0), PlanEntry("second", "linear", (6, 12), 4, 12.0)))
    found = variance_gains(model, plan, lambda: [model(x) for x in batches], of=of, largest=4, seed=0)  # type: ignore[arg-type, func-returns-value, return-value]
    x = torch.cat(batches).flatten(0, 1)
    hidden = x @ model.first.weight.t()
    states = [x, hidden] if of == "input" else [hidden, hidden @ model.second.weight.t()]
    for path, seen in zip(("first", "second"), states, strict=True):
        values = torch.linalg.svdvals(seen.detach().double()).square()
        torch.testing.assert_close(torch.tensor(found[path]).double(), (values / values.sum())[:4], rtol=1e-3, atol=1e-5)
    assert not model.first._forward_hooks and not model.second._forward_hooks


def test_only_linear_layers_have_states_to_read() -> None:
    with pytest.raises(ConfigError, match=r"ranks\.score activation reads linear layers only, not 'b'.*gradient"):
        variance_gains(Two(), Plan(ENTRIES), lambda: None, of="input", largest=4, seed=0)

"""The importance of rank-one terms against loops over single numbers, the falling budget, and which terms are kept."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.errors import ConfigError
from lorakeet.ranks.allocate import pair_parameters, rank_cost
from lorakeet.ranks.prune import Importance, cuts, final_budget, most_important, with_ranks
from lorakeet.ranks.spec import RanksSpec

PLAN = Plan(
    (
        PlanEntry("a.q", "linear", (5, 7), 3, 12.0),
        PlanEntry("a.embed", "embedding", (11, 4), 2, 12.0),
        PlanEntry("a.experts", "experts", (2, 6, 5), 3, 12.0, "alpha/sqrt(rank)"),
    )
)


def parameters(seed: int = 0) -> dict[str, Parameter]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {f"{e.path}.{name}": shape for e in PLAN.entries for name, shape in (("A", e.shape_a), ("B", e.shape_b))}
    return {name: Parameter(torch.randn(shape, generator=chance)) for name, shape in shapes.items()}


def steps(count: int) -> list[dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(5)
    return [{name: torch.randn(p.shape, generator=chance) for name, p in parameters().items()} for _ in range(count)]


def seen(count: int) -> tuple[Importance, dict[str, Parameter]]:
    found, live = Importance(PLAN), parameters()
    for gradients in steps(count):
        for name, parameter in live.items():
            parameter.grad = gradients[name].clone()
        found.see(live)
    return found, live


def slow(entry: PlanEntry, number: int, count: int) -> float:
    """The importance of term `number` as the paper writes it, number by number in Python's floats."""
    values, history, whole = parameters(), steps(count), 0.0
    for factor, dim in (("A", 1 if entry.kind == "experts" else 0), ("B", 2 if entry.kind == "experts" else 1)):
        name = f"{entry.path}.{factor}"
        scores = []
        for place in itertools.product(*(range(size) for size in values[name].shape)):
            if place[dim] != number:
                continue
            smooth = uncertain = 0.0
            for gradients in history:
                now = abs(values[name][place].item() * gradients[name][place].item())
                smooth = 0.85 * smooth + 0.15 * now
                uncertain = 0.85 * uncertain + 0.15 * abs(now - smooth)
            scores.append(smooth * uncertain)
        whole += math.fsum(scores) / sum(score > 0 for score in scores)
    return whole


def test_importance_is_what_the_paper_says_number_by_number() -> None:
    found, _ = seen(4)
    for entry in PLAN.entries:
        expected = [slow(entry, number, 4) for number in range(entry.rank)]
        assert found.of_terms()[entry.path].tolist() == pytest.approx(expected, rel=1e-5)
        assert len({round(score, 9) for score in expected}) == entry.rank


def test_a_gradient_that_is_not_there_counts_as_zero() -> None:
    found, live = seen(2)
    with_none, zeros = Importance(PLAN), Importance(PLAN)
    for importance, gradient in ((with_none, None), (zeros, 0.0)):
        importance.load(found.state(), torch.device("cpu"))
        live["a.q.A"].grad = None if gradient is None else torch.zeros_like(live["a.q.A"])
        importance.see(live)
    assert torch.equal(with_none.of_terms()["a.q"], zeros.of_terms()["a.q"])
    assert (with_none.of_terms()["a.q"] != found.of_terms()["a.q"]).all()


def test_numbers_without_a_gradient_do_not_thin_out_a_term() -> None:
    """Three of eleven tokens in the rows, one of two experts chosen: the terms are worth what these alone are worth."""
    found, live = Importance(PLAN), parameters()
    chosen = {"a.embed.A": (slice(None), [1, 4, 7]), "a.experts.A": ([0],), "a.experts.B": ([0],)}
    for gradients in steps(4):
        for name, parameter in live.items():
            parameter.grad = gradients[name].clone()
            if name in chosen:
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad[chosen[name]] = gradients[name][chosen[name]]
        found.see(live)
    state = found.state()
    for path, dims in (("a.embed", (0, 1)), ("a.experts", (1, 2))):
        expected = torch.zeros(live[f"{path}.A"].shape[dims[0]]).double()
        for factor, dim in zip(("A", "B"), dims, strict=True):
            product = state[f"{path}.{factor}|sensitivity"].double() * state[f"{path}.{factor}|uncertainty"].double()
            part = product[chosen[f"{path}.{factor}"]] if f"{path}.{factor}" in chosen else product
            expected += part.movedim(dim, 0).flatten(1).mean(1)
        torch.testing.assert_close(found.of_terms()[path], expected)
    unseen = Importance(PLAN)
    for parameter in live.values():
        parameter.grad = None
    unseen.see(live)
    assert all(not scores.any() for scores in unseen.of_terms().values()), "0, not nan, where no number had one"


def test_its_state_comes_back_bit_for_bit_and_terms_that_are_cut_are_forgotten() -> None:
    found, _ = seen(3)
    again = Importance(PLAN)
    again.load({name: tensor.clone() for name, tensor in found.state().items()}, torch.device("cpu"))
    before = found.of_terms()
    assert all(torch.equal(again.of_terms()[path], score) for path, score in before.items())
    for path in ("a.q", "a.experts"):
        again.keep(path, torch.tensor([0, 2]))
        assert torch.equal(again.of_terms()[path], before[path][[0, 2]])
    again.keep("a.embed", torch.tensor([], dtype=torch.int64))
    assert len(again.of_terms()["a.embed"]) == 0
    again.forget()
    assert again.state() == {}


def test_the_most_important_terms_that_fit_are_kept() -> None:
    """Costs of a term: 12, 15 and 22 parameters; the budget is spent from the top, and what does not fit is passed over."""
    importance = {
        "a.q": torch.tensor([0.1, 9.0, 0.2]), "a.embed": torch.tensor([8.0, 0.0]), "a.experts": torch.tensor([5.0, 7.0, 6.0]),
    }  # fmt: skip
    assert [rank_cost(entry) for entry in PLAN.entries] == [12, 15, 22]
    kept = most_important(PLAN, importance, 12 + 15 + 22 + 22)
    assert {path: terms.tolist() for path, terms in kept.items()} == {"a.q": [1], "a.embed": [0], "a.experts": [1, 2]}
    kept = most_important(PLAN, importance, 12 + 15 + 22 + 21)  # the second 22 does not fit: the next 12 does
    assert {path: terms.tolist() for path, terms in kept.items()} == {"a.q": [1, 2], "a.embed": [0], "a.experts": [1]}
    none = most_important(PLAN, {**importance, "a.embed": torch.tensor([0.0, 0.0])}, 12 + 22)
    assert len(none["a.embed"]) == 0, "a matrix may lose all of its terms"


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_kept_and_nothing_that_fits_is_left_out(seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    plan = replace(PLAN, entries=tuple(replace(entry, rank=20) for entry in PLAN.entries))
    importance = {entry.path: torch.rand(20, generator=chance).double() for entry in plan.entries}
    for budget in (13, 100, 333, 500, pair_parameters(plan) - 1):
        ranks = {path: len(terms) for path, terms in most_important(plan, importance, budget).items()}
        spent = sum(ranks[entry.path] * rank_cost(entry) for entry in plan.entries)
        left_out = [rank_cost(entry) for entry in plan.entries if ranks[entry.path] < entry.rank]
        assert spent == pair_parameters(with_ranks(plan, ranks)) <= budget < spent + min(left_out)
        assert len(with_ranks(plan, ranks).entries) == sum(rank > 0 for rank in ranks.values())


def test_equal_terms_go_by_their_order() -> None:
    alike = {entry.path: torch.ones(entry.rank).double() for entry in PLAN.entries}
    kept = most_important(PLAN, alike, 2 * 12)
    assert {path: terms.tolist() for path, terms in kept.items()} == {"a.q": [0, 1], "a.embed": [], "a.experts": []}


def test_cut_pairs_keep_their_scale() -> None:
    cut = with_ranks(PLAN, {"a.q": 2, "a.embed": 0, "a.experts": 1})
    assert [(entry.path, entry.rank) for entry in cut.entries] == [("a.q", 2), ("a.experts", 1)]
    assert [entry.scale for entry in cut.entries] == pytest.approx([12 / 3, 12 / math.sqrt(3)], rel=1e-12)
    assert with_ranks(PLAN, {entry.path: entry.rank for entry in PLAN.entries}) == PLAN


def test_the_budget_falls_by_a_cube() -> None:
    spec = RanksSpec(choose="prune", prune_from=0.1, prune_until=0.5, prune_cuts=4)
    found = cuts(spec, 100, at_first=3000, budget=2000)
    expected = {10 + 10 * k: 2000 + math.floor(1000 * (1 - k / 4) ** 3 + 1e-9) for k in (1, 2, 3, 4)}
    assert found == expected == {20: 2421, 30: 2125, 40: 2015, 50: 2000}
    assert cuts(replace(spec, prune_cuts=9), 20, at_first=3000, budget=2000).keys() == set(range(3, 11)), "one cut a step at most"


@pytest.mark.parametrize(("total", "changes"), [(6, {}), (1, {}), (20, {"prune_from": 0.0, "prune_cuts": 10})])
def test_a_run_that_is_too_short_is_refused(total: int, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"A run of {total} steps would be pruned after step \d.*needs 3 steps"):
        cuts(RanksSpec(choose="prune", **changes), total, at_first=300, budget=200)


def test_budgets_that_leave_nothing_or_cut_nothing_are_refused() -> None:
    at_first = pair_parameters(PLAN)
    assert final_budget(RanksSpec(choose="prune"), PLAN) == math.floor(at_first / 1.5)
    assert final_budget(RanksSpec(choose="prune", budget="12"), PLAN) == 12
    with pytest.raises(ConfigError, match="below one rank of the smallest target, which needs 12"):
        final_budget(RanksSpec(choose="prune", budget="11"), PLAN)
    for budget in (at_first, 10 * at_first):
        with pytest.raises(ConfigError, match=f"not below the initial {at_first} in 3 pairs"):
            final_budget(RanksSpec(choose="prune", budget=str(budget)), PLAN)

"""`ranks.resize`: the weighted cut against the dense definition of what it minimises, and the moments against whole ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, DataError
from lorakeet.merging.low_rank import truncate_factors
from lorakeet.models.families import family_of
from lorakeet.models.inject import adapter_of, inject
from lorakeet.models.targets import plan_for
from lorakeet.ranks.resize import (
    DAMPING,
    Moments,
    check_pairs,
    collect_moments,
    cut_to_budget,
    cut_to_ranks,
    cut_to_target,
    spectra,
    spectrum,
)  # fmt: skip

OUT, IN, RANK, ALPHA = 11, 14, 4, 12.0


def pair_of(seed: int, rank: int = RANK) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator), 3.0 * rank)


def seen(pair: Pair, seed: int) -> tuple[Moments, Tensor, Tensor]:
    """Moments of random inputs and gradients of uneven sizes, and the damped C and S that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(60, IN, generator=generator) * torch.linspace(0.1, 3, IN)).double()
    g = (torch.randn(60, OUT, generator=generator) * torch.linspace(2, 0.05, OUT)).double()
    h, u = x @ pair.A.double().t(), g @ pair.B.double()
    moments = Moments(h.t() @ h, u.t() @ u, float(x.square().sum()), float(g.square().sum()))
    C, S = x.t() @ x, g.t() @ g
    C = C + DAMPING * C.trace() / IN * torch.eye(IN)
    S = S + DAMPING * S.trace() / OUT * torch.eye(OUT)
    return moments, C, S


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.t()


@pytest.mark.parametrize("weighting", ["loss", "activation"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_cut_is_the_best_of_its_rank_in_the_weighted_norm(weighting: Any, rank: int) -> None:
    pair = pair_of(0)
    moments, C, S = seen(pair, 1)
    left = root(S) if weighting == "loss" else torch.eye(OUT).double()
    weighted = left @ pair.delta().double() @ root(C)
    values = torch.linalg.svdvals(weighted)
    found = spectrum(pair, moments, weighting)
    torch.testing.assert_close(found.values, values[:RANK], rtol=1e-6, atol=1e-9)
    short = cut_to_ranks(Adapter({"a": pair}), {"a": found}, {"a": rank}).pairs["a"]
    error = left @ (pair.delta() - short.delta()).double() @ root(C)
    assert short.rank == rank and short.scale == pytest.approx(pair.scale)
    assert float(error.square().sum()) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_without_weights_it_is_the_cut_of_eckart_and_young() -> None:
    pair = pair_of(0)
    found = spectrum(pair, Moments(torch.zeros(RANK, RANK), torch.zeros(RANK, RANK)), "none")
    short = cut_to_ranks(Adapter({"a": pair}), {"a": found}, {"a": 2}).pairs["a"]
    plain = truncate_factors(pair.A, pair.B, 2)
    torch.testing.assert_close(short.B @ short.A, plain.B @ plain.A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(short.A.norm(dim=1), short.B.norm(dim=0), rtol=1e-4, atol=1e-5)  # neither factor far larger


@pytest.mark.parametrize("weighting", ["loss", "activation", "none"])
def test_at_its_own_rank_a_pair_is_what_it_was_also_where_nothing_was_seen_of_it(weighting: Any) -> None:
    pair = replace(pair_of(2), bias=torch.ones(OUT))
    moments, _, _ = seen(pair, 3)
    one_row = Moments(moments.inputs, torch.zeros(RANK, RANK).double(), moments.input_trace, 1.0)
    for given in (moments, one_row):
        same = cut_to_ranks(Adapter({"a": pair}), {"a": spectrum(pair, given, weighting)}, {"a": 9}).pairs["a"]
        torch.testing.assert_close(same.delta(), pair.delta(), rtol=1e-4, atol=1e-4)
        assert same.rank == RANK and same.bias is pair.bias


def two() -> tuple[Adapter, Plan, dict[str, Moments]]:
    strong, weak = pair_of(0), pair_of(1)
    weak = replace(weak, B=weak.B * 1e-3)
    adapter = Adapter({"strong": strong, "weak": weak})
    plan = Plan(tuple(PlanEntry(path, "linear", (OUT, IN), RANK, ALPHA) for path in adapter.pairs))
    return adapter, plan, {path: seen(pair, 5)[0] for path, pair in adapter.pairs.items()}


def test_a_budget_goes_where_it_is_missed_most() -> None:
    adapter, plan, moments = two()
    found = spectra(adapter, moments)
    short = cut_to_budget(adapter, plan, found, 5 * (OUT + IN))
    assert [pair.rank for pair in short.pairs.values()] == [4, 1] and short.parameters == 5 * (OUT + IN)


def test_sizes_as_people_write_them() -> None:
    adapter, plan, moments = two()
    found = spectra(adapter, moments)
    for text in ("rank 2", "r2", "RANK2"):
        assert [pair.rank for pair in cut_to_target(text, adapter, plan, found).pairs.values()] == [2, 2]
    assert cut_to_target("0.1k", adapter, plan, found).parameters == 100
    for text in ("rank 4", "rank 0", "rank", "rank two", "lots", "-3"):
        with pytest.raises(ConfigError, match="--to"):
            cut_to_target(text, adapter, plan, found)
    with pytest.raises(ConfigError, match="49 parameters is below rank 1 for each of the 2 targets"):
        cut_to_target("49", adapter, plan, found)


def test_what_cannot_be_cut_is_named_all_at_once() -> None:
    with pytest.raises(ConfigError, match="has no low-rank pairs"):
        check_pairs(Adapter({}))
    pairs = {"a": replace(pair_of(0), magnitude=torch.ones(OUT)), "b": replace(pair_of(0), kind="embedding"), "c": pair_of(0)}
    with pytest.raises(ConfigError) as caught:
        check_pairs(Adapter(pairs))
    assert "'a' is a DoRA pair" in str(caught.value) and "'b' is on a embedding weight" in str(caught.value)
    assert "'c'" not in str(caught.value)


def test_moments_that_are_no_numbers_are_refused() -> None:
    adapter, _, moments = two()
    moments["weak"].gradients[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite on these rows"):
        spectra(adapter, moments)


def test_the_moments_are_those_of_inputs_and_gradients(tiny_model: Callable[..., Any]) -> None:
    """Of the last matrix before the loss, where both are known by hand."""
    model = tiny_model("llama")
    plan = plan_for(model, LoraSpec(rank=RANK, alpha=ALPHA, target_modules=("lm_head",)), family_of(model.config))
    inject(model, plan, seed=0)
    path = plan.entries[0].path
    with torch.no_grad():
        next(module for name, module in model.named_modules() if name.endswith("lm_head.adapters.default")).B.normal_()
    pair = adapter_of(model).pairs[path]
    ids = torch.arange(12).view(2, 6)
    with collect_moments(model, "default") as moments:
        model(input_ids=ids).logits.square().sum().backward()
        states = model.model(input_ids=ids).last_hidden_state
    logits = model(input_ids=ids).logits
    x, g = states.detach().flatten(0, 1).double(), 2 * logits.detach().flatten(0, 1).double()
    h, u = x @ pair.A.double().t(), g @ pair.B.double()
    found = moments[path]
    torch.testing.assert_close(found.inputs, h.t() @ h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gradients, u.t() @ u, rtol=1e-4, atol=1e-5)
    assert found.input_trace == pytest.approx(float(x.square().sum()), rel=1e-5)
    assert found.gradient_trace == pytest.approx(float(g.square().sum()), rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())

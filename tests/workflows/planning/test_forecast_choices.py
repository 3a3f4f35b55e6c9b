"""What is held while ranks are measured and rates tried, and that no allocation within a budget holds more than was planned."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.memory.allocator import SMALL_SLACK, release_free_memory
from lorakeet.memory.measure import peak_bytes, reset_peak, resident_bytes
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.quant.spec import QuantSpec
from lorakeet.ranks.allocate import allocate, pair_parameters, rank_pattern
from lorakeet.ranks.score import Sketch
from lorakeet.workflows.planning import forecast_choices
from lorakeet.workflows.planning.forecast_choices import (
    _decomposing,
    budget_of,
    largest_ranks,
    while_measuring,
    while_trying,
    with_importance,
    with_largest_ranks,
)
from lorakeet.workflows.planning.forecast_text_run import SCORE, SEARCH, Precision, forecast_run
from lorakeet.workflows.planning.rehearse_text import STEP, Rehearsal, RowShape, rehearse

SMALL = config_from_settings(
    {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32",
    }
)  # fmt: skip
ROWS = RowShape(32, 2)
FP32 = Precision(torch.float32, torch.float32, QuantSpec())


def settings(**changes: str) -> RunConfig:
    given = {
        "model.path": "small", "data.train": "none", "lora.rank": "4", "lora.alpha": "12", "data.max_tokens": "32",
        "train.micro_tokens": "64", "ranks": "auto", "ranks.max_rank": "12",
    }  # fmt: skip
    return read_run(None, {**given, **{name.replace("__", "."): value for name, value in changes.items()}})


def rehearsed(config: RunConfig, lora: LoraSpec) -> Rehearsal:
    fp32 = torch.float32
    build = partial(
        model_from_config, SMALL, name="small", dtype=fp32, products=fp32, attention="varlen", quantize=QuantSpec(), files=None
    )
    return rehearse(build, lora, config.train, rows=ROWS)


def test_no_way_to_spend_the_budget_holds_more_than_what_is_planned() -> None:
    config = settings(ranks__budget="9k")
    found = rehearsed(config, config.lora)
    planned = with_largest_ranks(config, found, partial(rehearsed, config))
    assert pair_parameters(planned.plan) <= 9000 == budget_of(config, found.plan)
    assert sum(entry.rank for entry in planned.plan.entries) > 1.1 * sum(entry.rank for entry in found.plan.entries)
    chance = random.Random(0)
    for _ in range(3):
        gains = {entry.path: sorted((chance.random() for _ in range(12)), reverse=True) for entry in found.plan.entries}
        worth = {path: [value * chance.choice((1e-3, 1.0)) for value in values] for path, values in gains.items()}
        falling = {path: sorted(values, reverse=True) for path, values in worth.items()}
        spent = allocate(found.plan, falling, 9000, largest=12)
        one = rehearsed(config, replace(config.lora, rank_pattern=rank_pattern(spent, config.lora)))
        assert one.peaks[STEP].bytes <= planned.peaks[STEP].bytes <= 1.1 * one.peaks[STEP].bytes


def test_budgets_that_cannot_be_spent_are_refused_before_anything_is_loaded() -> None:
    config = settings()
    plan = rehearsed(config, config.lora).plan
    assert budget_of(config, plan) == pair_parameters(plan), "without a budget, as many as lora.rank takes"
    with pytest.raises(ConfigError, match="below rank 1 for each of the 14 targets"):
        largest_ranks(settings(ranks__budget="100"), plan)
    with pytest.raises(ConfigError, match="above the full rank"):
        largest_ranks(settings(ranks__budget="9M"), plan)
    even = largest_ranks(settings(lora__start="orthogonal", ranks__budget="9001"), plan)
    assert all(rank % 2 == 0 for rank in even.rank_pattern.values())


@pytest.mark.parametrize("score", ["gradient", "activation", "sensitivity"])
def test_measuring_ranks_is_a_phase_of_its_own(score: str) -> None:
    config = settings(ranks__score=score)
    found = rehearsed(config, config.lora)
    held = while_measuring(config, found, partial(rehearsed, config))
    assert held is not None
    assert "moments" not in held.kinds or score != "gradient"
    least = sum((12 + 8) * 4 * entry.shape[1 if score == "activation" else 0] for entry in found.plan.entries)
    assert held.kinds["scratch"] >= least
    planned = forecast_run(config, SMALL, Precision(torch.float32, torch.float32, QuantSpec()), runtime=1 << 20)
    assert planned.forecast.phase(SCORE).kinds["scratch"] >= held.kinds["scratch"]  # a run's held-out rows may be longer
    assert planned.peak >= planned.forecast.phase(SCORE).bytes <= planned.training_peak


def test_sketches_are_counted_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs of the rehearsal are those that scoring puts in: rank 12 + 8, capped where a matrix is smaller."""
    config, seen = settings(ranks__max_rank="30"), []

    def watched(lora: LoraSpec) -> Any:
        result = rehearsed(config, lora)
        seen.append({entry.rank for entry in result.plan.entries})
        return result

    while_measuring(config, rehearsed(config, config.lora), watched)
    assert seen == [{32, 38}], "k_proj and v_proj are 32 wide"
    given = settings(ranks="given", lora__start="gradient")
    while_measuring(given, rehearsed(given, given.lora), watched)
    assert seen[1:] == [{4 + 8}], "a start measures no more than its own ranks"
    given = settings(ranks="given")
    assert while_measuring(given, rehearsed(given, given.lora), watched) is None


def test_three_adapters_take_their_gradients_and_moments() -> None:
    config = settings()
    found = rehearsed(config, config.lora)
    step, three = found.peaks[STEP], while_trying(config, found, ROWS)
    parameters = found.plan.parameters
    assert step.kinds["moments"] >= 8 * parameters  # and each tensor's count of steps
    assert three.kinds["moments"] == 3 * step.kinds["moments"]
    assert three.kinds["gradients"] - step.kinds.get("gradients", 0) == 2 * 4 * parameters
    assert three.kinds["saved activations"] == step.kinds["saved activations"], "a pass is no larger than that of one"
    laid_out = 3 * 2 * (64 + 128) * 16  # three matrices of an MLP in bf16, their ranks as whole sixteens
    assert three.kinds["scratch"] - step.kinds.get("scratch", 0) == 2 * laid_out, "of two more members"
    wide = while_trying(replace(config, train=replace(config.train, micro_tokens=256)), found, ROWS)
    assert wide.kinds["saved activations"] == 3 * step.kinds["saved activations"], "rows of three members, where one has few"


def test_a_search_keeps_the_best_values_of_all_and_two_earlier_adapters() -> None:
    config = settings()
    found = rehearsed(config, config.lora)
    trial, search = (while_trying(config, found, ROWS, 5, searching=searching) for searching in (False, True))
    assert search.bytes - trial.bytes == 7 * 4 * found.plan.parameters
    planned = forecast_run(config, SMALL, FP32, runtime=0, returning=True)
    assert planned.searching(1) is planned
    few, many = (planned.searching(members) for members in (5, 5000))
    assert few.forecast.phase(SEARCH).bytes < many.forecast.phase(SEARCH).bytes == many.peak
    assert few.peak == max(planned.peak, few.forecast.phase(SEARCH).bytes)


@pytest.mark.parametrize("score", ["gradient", "activation", "sensitivity"])
def test_what_was_measured_is_taken_apart_within_the_plan(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(ranks__score=score)
    found = rehearsed(config, config.lora)
    monkeypatch.setattr(forecast_choices, "svd_bytes", lambda *_, **__: 1 << 30)
    measured = while_measuring(config, found, partial(rehearsed, config))
    assert measured is not None and found.base + (1 << 30) < measured.bytes < found.base + (2 << 30)


def test_taking_a_matrix_apart_holds_no_more_than_is_planned() -> None:
    """Of the process, whose heap may grow by SMALL_SLACK beside the tensors."""
    directions, width = 136, 8192
    sketch = Sketch(width, directions, torch.Generator().manual_seed(0))
    sketch.add(torch.randn(300, width, generator=torch.Generator().manual_seed(1)))
    sketch.directions("q", 4)  # what a first time leaves behind is there now
    assert release_free_memory() and reset_peak()
    before = resident_bytes()
    sketch.directions("q", 4)
    planned, used = _decomposing(directions, width), peak_bytes() - before
    assert 2 * 8 * directions * width <= used <= planned + SMALL_SLACK


def test_a_run_that_prunes_is_planned_at_its_first_ranks_with_what_it_knows_of_each_number() -> None:
    given, pruned = settings(ranks="given"), settings(ranks="prune", ranks__budget="2k")
    found = rehearsed(given, given.lora)
    peaks, plain = with_importance(pruned, found), with_importance(given, found)
    assert plain == found.peaks
    assert peaks[STEP].bytes - found.peaks[STEP].bytes == 2 * 4 * pair_parameters(found.plan)
    judged = [name for name, peak in peaks.items() if peak == found.peaks[name]]
    assert judged and STEP not in judged, "once training is over nothing of it is held"
    precision = Precision(torch.float32, torch.float32, QuantSpec())
    planned, least = (forecast_run(config, SMALL, precision, runtime=1 << 20) for config in (pruned, given))
    assert planned.plan == least.plan and planned.rate_trial == least.rate_trial, "a trial of rates prunes nothing"
    assert planned.forecast.phase(STEP).kinds["moments"] > 1.9 * least.forecast.phase(STEP).kinds["moments"]
    with pytest.raises(ConfigError, match="has nothing to cut"):
        with_importance(settings(ranks="prune", ranks__budget="9M"), found)

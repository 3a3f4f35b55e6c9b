"""Forecasts of runs: the micro-batch they are about, what loading and merging take, and that a real step keeps them."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.errors import ConfigError
from lorakeet.memory.allocator import SMALL_SLACK
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.measure import peak_bytes
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.planning.forecast_text_run import (
    EXPORT,
    FLOORS,
    LOAD,
    MERGE,
    SCORE,
    TOKENIZER_ENTRY,
    RowLengths,
    TextRunPlan,
    Workload,
    _decomposing,
    budget_of,
    evaluation_of,
    filling_rows,
    forecast_run,
    largest_ranks,
    largest_rows,
    text_runtime_bytes,
    while_measuring,
    with_importance,
    with_largest_ranks,
)
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import BEGIN, FINAL, STEP, Rehearsal, RowShape, rehearse
from lorakeet.quant.spec import QuantSpec
from lorakeet.ranks.allocate import allocate, pair_parameters, rank_pattern
from lorakeet.ranks.score import Sketch
from tiny.settled import settled_bytes

SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32",
}  # fmt: skip
FP32 = Precision(torch.float32, torch.float32, QuantSpec())
RUNTIME = 300 << 20


def settings(**changes: str) -> RunConfig:
    given = {"model.path": "small", "data.train": "none", "lora.rank": "4", "lora.alpha": "12", "data.max_tokens": "32"}
    return read_run(None, {**given, **{name.replace("__", "."): value for name, value in changes.items()}})


def planned(precision: Precision = FP32, **changes: str) -> TextRunPlan:
    return forecast_run(settings(**changes), config_from_settings(SMALL), precision, runtime=RUNTIME)


@pytest.mark.parametrize(
    ("max_tokens", "micro_tokens", "batch", "expected"),
    [("32", "100", "16", RowShape(32, 4, last=4)), ("32", "100", "2", RowShape(32, 2)), ("64", "32", "16", RowShape(64, 1))],
)
def test_the_largest_micro_batch(max_tokens: str, micro_tokens: str, batch: str, expected: RowShape) -> None:
    found = largest_rows(settings(data__max_tokens=max_tokens, train__micro_tokens=micro_tokens, train__batch_size=batch))
    assert found == expected


GEMMA = {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "head_dim": 16, "sliding_window": 4096}
UNLIKE = [
    ("varlen", GEMMA),
    ("varlen", {"model_type": "mistral", "sliding_window": 200, "head_dim": 16}),
    ("varlen", {"attention_dropout": 0.1}),
    ("eager", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "changes"), UNLIKE)
def test_one_long_row_beside_short_ones_holds_no_more_than_is_planned(attention: str, changes: dict[str, Any]) -> None:
    """Where attention keeps the scores of a row, two rows of the mean length hold far less than the long one."""
    config = settings(data__max_tokens="256", train__batch_size="2", train__micro_tokens="512", model__attention=attention)
    model = config_from_settings({**SMALL, "num_attention_heads": 8, **changes})
    build = partial(model_from_config, model, name="small", attention=attention, quantize=QuantSpec(), files=None)
    narrow = partial(build, dtype=torch.float32, products=torch.float32)
    rows = largest_rows(config, RowLengths(240, 264))
    planned, met = (rehearse(narrow, config.lora, config.train, rows=one) for one in (rows, RowShape(240)))
    assert planned.peaks[STEP].bytes >= met.peaks[STEP].bytes
    assert rows == (RowShape(240, 2) if attention == "eager" else RowShape(240, 2, last=24))


@pytest.mark.slow
def test_no_micro_batch_of_rows_holds_more_than_the_planned_one() -> None:
    """Tokens, and their squares: of all rows, of rows longer than a window, and of rows as long as the longest beside them."""
    chance = np.random.default_rng(0)
    for _ in range(200):
        some = np.sort(np.minimum(256, chance.geometric(0.02, 12) + 2))[::-1]
        rows = [Example(np.zeros(length, np.int64), np.arange(length) > 0, "", None, False) for length in some]
        step, micro, window = int(sum(some[:8])), int(chance.integers(32, 1024)), int(chance.integers(16, 256))
        config = settings(data__max_tokens="256", train__batch_size="8", train__micro_tokens=str(micro))
        lengths, padded = RowLengths(int(some[0]), step), config.changed(model={"attention": "sdpa"})
        packed, wide, beside = largest_rows(config, lengths), largest_rows(config, lengths, window), largest_rows(padded, lengths)
        for batch in micro_batches(rows[:8], micro):
            assert batch.tokens <= packed.tokens <= wide.tokens
            assert squares(batch.lengths) <= squares(packed.lengths)
            assert squares(batch.lengths, window) <= squares(wide.lengths, window)
        for batch in micro_batches(rows[:8], micro, padded=True):
            longest, count = max(batch.lengths), len(batch.lengths)
            assert longest * count <= beside.tokens and longest**2 * count <= squares(beside.lengths)


def squares(lengths: tuple[int, ...], window: int = 0) -> int:
    return sum(length**2 for length in lengths if length > window)


def test_a_last_row_counts_as_longer_than_the_window_if_another_could_be() -> None:
    assert filling_rows(1000, 1500, 500) == RowShape(1000, 2, last=501), "750 and 750 are both longer"
    assert filling_rows(1000, 1500, 750) == filling_rows(1000, 1500) == filling_rows(1000, 1500, 1000)


@pytest.mark.slow
def test_a_step_of_more_tokens_than_a_micro_batch_has_two_of_them() -> None:
    """Of 32 and 31 tokens beside micro_tokens of 33: gradients are there when the second one passes."""
    found = [
        forecast_run(
            settings(train__batch_size="2", train__micro_tokens=tokens), SMALL_CONFIG, FP32, runtime=0,
            workload=Workload(lengths=lambda: RowLengths(32, 63)),
        ).forecast.phase(STEP)
        for tokens in ("33", "63")
    ]  # fmt: skip
    assert found[0].kinds["gradients"] >= found[1].kinds.get("gradients", 0)


def test_few_shot_rows_are_planned_as_long_as_the_few_shot_base_sees_them() -> None:
    """Up to 1,024 tokens in the model's context, whatever data.max_tokens; under a budget no more than that."""
    few = settings(train__micro_tokens="64", evaluate__answer_tokens="96")
    model = config_from_settings({**SMALL, "max_position_embeddings": 512})
    assert evaluation_of(few).rows == RowShape(1024)
    size = evaluation_of(few, model_config=model)
    assert size.rows == RowShape(512, 2) and size.replies is not None and size.replies.length == 512
    assert evaluation_of(settings(train__micro_tokens="64", memory__budget="1GiB"), model_config=model).rows == RowShape(32, 32)


@pytest.mark.slow
def test_replies_are_planned_where_rows_may_end_in_answers() -> None:
    few = settings(train__micro_tokens="64", evaluate__answer_tokens="96", evaluate__examples="0")
    size = evaluation_of(few).replies
    assert size is not None and size.tokens >= 1024 and size.length <= 128
    assert evaluation_of(few, answered=False).replies is None
    assert evaluation_of(settings(evaluate__answers="0")).replies is None

    def final(**changes: Any) -> int:
        config = settings(train__micro_tokens="64", evaluate__answer_tokens="4096", **changes)
        found = forecast_run(config, config_from_settings(SMALL), FP32, runtime=RUNTIME, workload=Workload(labelled=False))
        return found.forecast.phase(FINAL).bytes

    assert final() > final(evaluate__answers="0"), "a long reply's keys and values"


def test_every_phase_holds_the_runtime_the_tokenizer_and_the_base() -> None:
    found = planned()
    names = ["load", "train step", "evaluate", "checkpoint", "final eval", "certify", "merge", "export"]
    assert [phase.name for phase in found.forecast.phases] == names
    for phase in found.forecast.phases:
        more = {"final eval": FLOORS, "certify": FLOORS + 96 * TOKENIZER_ENTRY + (64 << 20)}.get(phase.name, 0)  # PEFT's modules
        assert phase.kinds["runtime"] == RUNTIME + 96 * TOKENIZER_ENTRY + more
    assert found.forecast.phase(LOAD).kinds["base"] == found.base
    assert found.forecast.phase(MERGE).kinds["base"] >= 1.9 * found.base, "base + adapter beside the merged model, both in fp32"
    assert found.peak == max(phase.bytes for phase in found.forecast.phases if phase.name not in ("merge", "export"))
    assert found.training_peak <= found.peak and found.to_mapping()["peak"] == found.peak


@pytest.mark.slow
def test_a_start_from_the_weights_takes_no_more_than_is_planned() -> None:
    """Of the process: the matrices are of 23 MB in bf16, and the copy in fp32 of one of them is the most that comes and goes."""
    shape = {**SMALL, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "num_attention_heads": 16}
    narrow = Precision(torch.bfloat16, torch.bfloat16, QuantSpec())
    config = settings(lora__start="olora", lora__target_modules="up_proj,down_proj", train__batch_size="1")
    phase = forecast_run(config, config_from_settings(shape), narrow, runtime=0, returning=True).forecast.phase(BEGIN)
    text = model_from_config(config_from_settings(shape), name="random", dtype=torch.bfloat16, products=torch.bfloat16)
    plan = plan_for(text.model, config.lora, text.family)
    initialise_adapter(text, plan, seed=0, name="before")  # code and buffers are there now
    before = settled_bytes()
    initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0, name="again")
    used = peak_bytes() - before
    copy = 4 * 2048 * 5632
    assert copy <= used + (4 << 20) and used <= phase.bytes - phase.kinds["base"] - phase.kinds["runtime"]


def test_a_gptq_model_is_planned_as_it_is_packed() -> None:
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    packed = forecast_run(settings(), config_from_settings({**SMALL, "quantization_config": stored}), FP32, runtime=RUNTIME)
    dense = planned()
    assert packed.base < 0.5 * dense.base and packed.plan.parameters == dense.plan.parameters


def test_another_dtype_than_the_files_holds_some_tensors_as_they_are_stored() -> None:
    narrow = planned(Precision(torch.bfloat16, torch.float32, QuantSpec())).forecast.phase(LOAD)
    numbers = narrow.kinds["base"] // 2
    assert 0 < narrow.kinds["scratch"] < 4 * numbers, "less than all of the file in fp32"
    assert "scratch" not in planned().forecast.phase(LOAD).kinds


def test_gguf_blocks_need_a_file_that_has_them() -> None:
    with pytest.raises(ConfigError, match=r"names no \.gguf file"):
        planned(Precision(torch.float32, torch.float32, QuantSpec(method="gguf")))


def test_on_a_cuda_device_only_what_is_there_counts() -> None:
    host = planned()
    card = forecast_run(
        settings(), config_from_settings(SMALL), replace(FP32, device=torch.device("cuda")), runtime=CONTEXT, returning=True
    )
    names = [phase.name for phase in card.forecast.phases]
    assert names == [phase.name for phase in host.forecast.phases if phase.name not in (MERGE, EXPORT)]
    assert all(phase.kinds["runtime"] == CONTEXT for phase in card.forecast.phases), "neither tokenizer nor floors"
    assert card.base == host.base and card.forecast.phase(LOAD).kinds["base"] == card.base
    assert "scratch" not in card.forecast.phase(LOAD).kinds
    assert text_runtime_bytes(replace(FP32, device=torch.device("cuda"))) == CONTEXT


SMALL_CONFIG = config_from_settings(
    {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32",
    }
)  # fmt: skip
ROWS = RowShape(32, 2)


def chosen(**changes: str) -> RunConfig:
    given = {
        "model.path": "small", "data.train": "none", "lora.rank": "4", "lora.alpha": "12", "data.max_tokens": "32",
        "train.micro_tokens": "64", "ranks": "auto", "ranks.max_rank": "12",
    }  # fmt: skip
    return read_run(None, {**given, **{name.replace("__", "."): value for name, value in changes.items()}})


def rehearsed(config: RunConfig, lora: LoraSpec) -> Rehearsal:
    fp32 = torch.float32
    build = partial(
        model_from_config, SMALL_CONFIG, name="small", dtype=fp32, products=fp32, attention="varlen", quantize=QuantSpec(),
        files=None,
    )  # fmt: skip
    return rehearse(build, lora, config.train, rows=ROWS)


@pytest.mark.slow
def test_no_way_to_spend_the_budget_holds_more_than_what_is_planned() -> None:
    config = chosen(ranks__budget="9k")
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
    config = chosen()
    plan = rehearsed(config, config.lora).plan
    assert budget_of(config, plan) == pair_parameters(plan), "without a budget, as many as lora.rank takes"
    with pytest.raises(ConfigError, match="below rank 1 for each of the 14 targets"):
        largest_ranks(chosen(ranks__budget="100"), plan)
    with pytest.raises(ConfigError, match="above the full rank"):
        largest_ranks(chosen(ranks__budget="9M"), plan)
    even = largest_ranks(chosen(lora__start="orthogonal", ranks__budget="9001"), plan)
    assert all(rank % 2 == 0 for rank in even.rank_pattern.values())


@pytest.mark.slow
@pytest.mark.parametrize("score", ["gradient", "activation", "sensitivity"])
def test_measuring_ranks_is_a_phase_of_its_own(score: str) -> None:
    config = chosen(ranks__score=score)
    found = rehearsed(config, config.lora)
    held = while_measuring(config, found, partial(rehearsed, config))
    assert held is not None
    assert "moments" not in held.kinds or score != "gradient"
    least = sum((12 + 8) * 4 * entry.shape[1 if score == "activation" else 0] for entry in found.plan.entries)
    assert held.kinds["scratch"] >= least
    planned = forecast_run(config, SMALL_CONFIG, Precision(torch.float32, torch.float32, QuantSpec()), runtime=1 << 20)
    assert planned.forecast.phase(SCORE).kinds["scratch"] >= held.kinds["scratch"]  # a run's held-out rows may be longer
    assert planned.peak >= planned.forecast.phase(SCORE).bytes <= planned.training_peak


def test_taking_a_matrix_apart_holds_no_more_than_is_planned() -> None:
    """Of the process, whose heap may grow by SMALL_SLACK beside the tensors."""
    directions, width = 136, 8192
    sketch = Sketch(width, directions, torch.Generator().manual_seed(0))
    sketch.add(torch.randn(300, width, generator=torch.Generator().manual_seed(1)))
    sketch.directions("q", 4)  # what a first time leaves behind is there now
    before = settled_bytes()
    sketch.directions("q", 4)
    planned, used = _decomposing(directions, width), peak_bytes() - before
    assert 2 * 8 * directions * width <= used <= planned + SMALL_SLACK


def test_a_run_that_prunes_is_planned_at_its_first_ranks_with_what_it_knows_of_each_number() -> None:
    given, pruned = chosen(ranks="given"), chosen(ranks="prune", ranks__budget="2k")
    found = rehearsed(given, given.lora)
    peaks, plain = with_importance(pruned, found), with_importance(given, found)
    assert plain == found.peaks
    assert peaks[STEP].bytes - found.peaks[STEP].bytes == 2 * 4 * pair_parameters(found.plan)
    judged = [name for name, peak in peaks.items() if peak == found.peaks[name]]
    assert judged and STEP not in judged, "once training is over nothing of it is held"
    precision = Precision(torch.float32, torch.float32, QuantSpec())
    planned, least = (forecast_run(config, SMALL_CONFIG, precision, runtime=1 << 20) for config in (pruned, given))
    assert planned.plan == least.plan and planned.rate_trial == least.rate_trial, "a trial of rates prunes nothing"
    assert planned.forecast.phase(STEP).kinds["moments"] > 1.9 * least.forecast.phase(STEP).kinds["moments"]
    with pytest.raises(ConfigError, match="has nothing to cut"):
        with_importance(chosen(ranks="prune", ranks__budget="9M"), found)

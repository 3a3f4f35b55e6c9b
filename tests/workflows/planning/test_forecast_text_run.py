"""Forecasts of runs: the micro-batch they are about, what loading and merging take, and that a real step keeps them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.measure import peak_bytes, reset_peak, resident_bytes
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.planning.forecast_text_run import (
    CERTIFY,
    EXPORT,
    FLOORS,
    LOAD,
    MERGE,
    STEP,
    TOKENIZER_ENTRY,
    Again,
    Precision,
    TextRunPlan,
    evaluation_of,
    forecast_run,
    largest_rows,
    text_runtime_bytes,
)
from lorakeet.workflows.planning.rehearse_text import BEGIN, RowShape

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
    [("32", "100", "16", RowShape(25, 4)), ("32", "100", "2", RowShape(32, 2)), ("64", "32", "16", RowShape(64, 1))],
)
def test_the_largest_micro_batch(max_tokens: str, micro_tokens: str, batch: str, expected: RowShape) -> None:
    found = largest_rows(settings(data__max_tokens=max_tokens, train__micro_tokens=micro_tokens, train__batch_size=batch))
    assert found == expected


def test_as_many_rows_are_evaluated_as_fit() -> None:
    assert evaluation_of(settings(train__micro_tokens="4096", train__batch_size="1")).rows == RowShape(32, 128)
    assert evaluation_of(settings(train__micro_tokens="64")).rows == RowShape(32, 32), "the certificate reads 1,024 at once"


def test_every_phase_holds_the_runtime_the_tokenizer_and_the_base() -> None:
    found = planned()
    names = ["load", "train step", "evaluate", "checkpoint", "judge", "certify", "merge", "export"]
    assert [phase.name for phase in found.forecast.phases] == names
    for phase in found.forecast.phases:
        more = {"judge": FLOORS, "certify": FLOORS + 96 * TOKENIZER_ENTRY}.get(phase.name, 0)
        assert phase.kinds["runtime"] == RUNTIME + 96 * TOKENIZER_ENTRY + more
    assert found.forecast.phase(LOAD).kinds["base"] == found.base
    assert found.forecast.phase(MERGE).kinds["base"] >= 1.9 * found.base, "base + adapter beside the merged model, both in fp32"
    assert found.peak == max(phase.bytes for phase in found.forecast.phases if phase.name not in ("merge", "export"))
    assert found.training_peak <= found.peak and found.to_mapping()["peak"] == found.peak


def test_the_certificate_reads_the_base_again_but_not_under_a_budget() -> None:
    twice = planned().forecast.phase(CERTIFY)
    once = forecast_run(settings(), config_from_settings(SMALL), FP32, runtime=RUNTIME, returning=True).forecast.phase(CERTIFY)
    assert twice.kinds["base"] == 2 * once.kinds["base"]


@pytest.mark.parametrize(("computing", "copies"), [(900, 2), (100, 3)])
def test_within_a_budget_the_certificate_computes_with_two_adapters_and_reads_beside_three(computing: int, copies: int) -> None:
    """The value that is read has gone when the model computes; of an adapter larger than what computing takes it is the peak."""
    found: Any = SimpleNamespace(plan=SimpleNamespace(parameters=100), packed=True, largest=25)
    kept, judge = (add_usage(Usage(), base=1000, adapter=400, scratch=scratch) for scratch in (0, computing))
    peak = Again(found, Usage(), judge, words=0, adapter=400, second=False).peak(kept)
    assert peak.kinds == {"base": 1000, "adapter": copies * 400, "scratch": computing}


@pytest.mark.parametrize("changes", [{"lora__start": "pissa"}, {"lora__start": "olora"}, {"lora__variant": "dora"}])
def test_pairs_that_begin_from_the_weights_hold_a_matrix_in_fp32_beside_the_earlier_ones(changes: dict[str, str]) -> None:
    narrow = Precision(torch.bfloat16, torch.bfloat16, QuantSpec())
    found = forecast_run(settings(**changes), config_from_settings(SMALL), narrow, runtime=RUNTIME, returning=True)
    names = [phase.name for phase in found.forecast.phases]
    assert names[:3] == ["load", BEGIN, "train step"]
    kinds = found.forecast.phase(BEGIN).kinds
    assert kinds["scratch"] >= 4 * 64 * 128 and kinds["base"] == found.base
    anchors = 2 if "lora__start" in changes else 1
    assert 0.8 * anchors * 4 * found.plan.parameters <= kinds["adapter"] <= anchors * 4.4 * found.plan.parameters
    assert found.training_peak >= found.forecast.phase(BEGIN).bytes
    merged, plain = (one.forecast.phase(MERGE).kinds["adapter"] for one in (found, planned(narrow)))
    assert merged == anchors * plain or "lora__variant" in changes, "a pair with an anchor is merged at twice its rank"
    assert BEGIN not in [phase.name for phase in planned(narrow).forecast.phases], "random starts hold less than a step"


def test_a_start_from_the_weights_takes_no_more_than_is_planned() -> None:
    """Of the process: the matrices are of 23 MB in bf16, and the copy in fp32 of one of them is the most that comes and goes."""
    shape = {**SMALL, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "num_attention_heads": 16}
    narrow = Precision(torch.bfloat16, torch.bfloat16, QuantSpec())
    config = settings(lora__start="olora", lora__target_modules="up_proj,down_proj", train__batch_size="1")
    phase = forecast_run(config, config_from_settings(shape), narrow, runtime=0, returning=True).forecast.phase(BEGIN)
    text = model_from_config(config_from_settings(shape), name="random", dtype=torch.bfloat16, products=torch.bfloat16)
    plan = plan_for(text.model, config.lora, text.family)
    initialise_adapter(text, plan, seed=0, name="before")  # code and buffers are there now
    assert reset_peak()
    before = resident_bytes()
    initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0, name="again")
    used = peak_bytes() - before
    copy = 4 * 2048 * 5632
    assert copy <= used + (4 << 20) and used <= phase.bytes - phase.kinds["base"] - phase.kinds["runtime"]


def test_rows_without_labels_have_no_floors() -> None:
    found = forecast_run(settings(), config_from_settings(SMALL), FP32, runtime=RUNTIME, labelled=False)
    assert found.forecast.phase("judge").kinds["runtime"] == RUNTIME + 96 * TOKENIZER_ENTRY


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


def test_the_runtime_is_that_of_this_process() -> None:
    found = text_runtime_bytes(FP32, counts=1)
    assert abs(text_runtime_bytes(FP32) - found) < 16 << 20, "only narrow products have code that stays"
    assert 100 << 20 < found < 8 << 30


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


def test_packed_weights_are_unpacked_on_a_cuda_device_as_they_are_there() -> None:
    """Whole in fp32, where a CPU has them in parts."""
    config = config_from_settings({**SMALL, "hidden_size": 1024, "intermediate_size": 16384, "num_attention_heads": 8})
    scratch = []
    for name in ("cpu", "cuda"):
        packed = Precision(torch.float32, torch.float32, QuantSpec(method="int8"), torch.device(name))
        found = forecast_run(settings(model__quantize="int8"), config, packed, runtime=CONTEXT, returning=True)
        scratch.append(found.forecast.phase(STEP).kinds["scratch"])
    assert scratch[1] > scratch[0] + (16 << 20)

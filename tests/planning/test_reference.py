"""Copies of the reference in a plan: from the first step on, on the model while it computes, and none where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.memory.forecast import Forecast
from lorakeet.models.text.from_config import config_from_settings
from lorakeet.planning.forecast_text_run import TextRunPlan, forecast_run
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import CHECKPOINT, EVALUATE, FINAL, STEP
from lorakeet.quant.spec import QuantSpec

SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32",
}  # fmt: skip
FP32 = Precision(torch.float32, torch.float32, QuantSpec())
COMPARING: tuple[str, ...] = ("dpo", "ipo", "cdpo", "kto")


def settings(objective: str, reference: str = "start", **changes: str) -> RunConfig:
    given = {"model.path": "small", "data.train": "none", "lora.rank": "4", "data.max_tokens": "32", "train.objective": objective}
    return read_run(None, {**given, "train.reference": reference, **changes})


def planned(config: RunConfig, precision: Precision = FP32) -> TextRunPlan:
    return forecast_run(config, config_from_settings(SMALL), precision, runtime=1 << 28, returning=True)


def adapters(forecast: Forecast) -> dict[str, int]:
    return {phase.name: phase.kinds.get("adapter", 0) for phase in forecast.phases}


def differences(config: RunConfig, without: RunConfig, precision: Precision = FP32) -> dict[str, float]:
    """By phase, how many copies of the adapter the plan of one run has more than that of another, which has no reference."""
    more, less = planned(config, precision), planned(without, precision)
    one, found = 4 * more.plan.parameters, adapters(less.forecast)
    return {name: (size - found[name]) / one for name, size in adapters(more.forecast).items() if size != found[name]}


@pytest.mark.slow
@pytest.mark.parametrize("objective", COMPARING)
@pytest.mark.parametrize("reference", ["start", "runs/sft"])
def test_a_run_holds_its_reference_from_the_first_step_on(objective: str, reference: str) -> None:
    found = differences(settings(objective, reference), settings("orpo"))
    assert found == {STEP: 1, EVALUATE: 1, CHECKPOINT: 1, FINAL: 2, "certify": 1}


def test_a_gpu_holds_what_is_on_the_model_alone() -> None:
    card = replace(FP32, device=torch.device("cuda"))
    (name, more), = differences(settings("dpo"), settings("simpo"), card).items()  # fmt: skip
    assert name == FINAL and more >= 1, "an allocator hands out whole pieces"

"""What would help a run on text whose memory is above its budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.finetuning.plan_text import text_advice
from lorakeet.workflows.planning.forecast_text_run import Precision
from lorakeet.workflows.planning.rehearse_text import RowShape


def test_advice_for_weights_above_the_budget_is_for_a_streamed_run() -> None:
    """Settings are tried until one fits: with weights in memory none of them could."""
    config = read_run(None, {"model.path": "none", "data.train": "none", "memory.budget": "1MB", "lora.rank": "8"})
    precision = Precision(torch.float32, torch.float32, QuantSpec())
    planned: Any = SimpleNamespace(base=2_000_000, rows=RowShape(512))
    tried: list[RunConfig] = []

    def least(other: RunConfig) -> int:
        tried.append(other)
        return 1_200_000 if other.train.moments == "8bit" else 900_000

    found = text_advice(config, precision, planned, lambda *_, **__: SimpleNamespace(peak=3_000_000), least)
    streamed = [(item.change, item.peak) for item in found if item.streamed]
    shorter = "--data.max_tokens 256 --train.micro_tokens 256"
    assert streamed == [(shorter, 900_000), ("--train.moments 8bit", 1_200_000)] and len(tried) == 2
    assert [item.change for item in found if not item.streamed] == ["--model.dtype bfloat16", "--model.quantize nf4"]

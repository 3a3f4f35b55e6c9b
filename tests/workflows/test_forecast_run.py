"""Forecasts of runs: the micro-batch they are about, what loading and merging take, and that a real step keeps them."""

from __future__ import annotations

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError
from lorakeet.models.outline import config_from
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.rehearsal import Rows
from lorakeet.workflows.forecast_run import LOAD, MERGE, TOKENIZER_ENTRY, Planned, Precision, forecast_run, rows_of, runtime_bytes

SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32",
}  # fmt: skip
FP32 = Precision(torch.float32, torch.float32, QuantSpec())
RUNTIME = 300 << 20


def settings(**changes: str) -> RunConfig:
    given = {"model.path": "small", "data.train": "none", "lora.rank": "4", "lora.alpha": "12", "data.max_tokens": "32"}
    return read_run(None, {**given, **{name.replace("__", "."): value for name, value in changes.items()}})


def planned(precision: Precision = FP32, **changes: str) -> Planned:
    return forecast_run(settings(**changes), config_from(SMALL), precision, runtime=RUNTIME)


@pytest.mark.parametrize(
    ("max_tokens", "micro_tokens", "batch", "expected"),
    [("32", "100", "16", Rows(32, 3)), ("32", "100", "2", Rows(32, 2)), ("64", "32", "16", Rows(64, 1))],
)
def test_the_largest_micro_batch(max_tokens: str, micro_tokens: str, batch: str, expected: Rows) -> None:
    found = rows_of(settings(data__max_tokens=max_tokens, train__micro_tokens=micro_tokens, train__batch_size=batch))
    assert found == expected


def test_every_phase_holds_the_runtime_the_tokenizer_and_the_base() -> None:
    found = planned()
    assert [phase.name for phase in found.forecast.phases] == ["load", "evaluate", "train step", "checkpoint", "merge"]
    for phase in found.forecast.phases:
        assert phase.kinds["runtime"] == RUNTIME + 96 * TOKENIZER_ENTRY
    assert found.forecast.phase(LOAD).kinds["base"] == found.base
    assert found.forecast.phase(MERGE).kinds["base"] >= 1.9 * found.base, "base + adapter beside the merged model, both in fp32"


def test_another_dtype_than_the_files_leaves_the_files_pages_too() -> None:
    narrow = planned(Precision(torch.bfloat16, torch.float32, QuantSpec())).forecast.phase(LOAD)
    assert narrow.kinds["scratch"] > 1.5 * narrow.kinds["base"]
    assert "scratch" not in planned().forecast.phase(LOAD).kinds


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be planned"):
        planned(Precision(torch.float32, torch.float32, QuantSpec(method="gguf")))


def test_the_runtime_is_that_of_this_process() -> None:
    found = runtime_bytes(FP32)
    assert 100 << 20 < found < 8 << 30

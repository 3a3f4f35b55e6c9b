"""A run is planned with the first attention with which its model runs on shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import EnvironmentProblem
from lorakeet.planning.attention_choice import with_any_attention
from lorakeet.planning.forecast_text_run import RowLengths, Workload, forecast_run
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import STEP, NotPlanned, PlanningTooLong
from lorakeet.planning.text_run import TextRun
from lorakeet.quant.spec import QuantSpec
from tiny.small_configs import small_config


def settings(**changes: str) -> RunConfig:
    given = {"model.path": "tiny", "data.train": "-", "out": "none", "lora.rank": "2", "data.max_tokens": "16"}
    return read_run(None, {**given, "train.micro_tokens": "16", "model.dtype": "float32", **changes})


@pytest.mark.slow
def test_a_model_whose_own_code_needs_a_mask_is_planned_with_sdpa() -> None:
    """DeepSeek-V3.2's indexer takes the mask apart, which packed rows have none of."""
    precision = Precision(torch.float32, torch.float32, QuantSpec())
    assert forecast_run(settings(), small_config("deepseek_v32"), precision, runtime=0).peak > 0
    with pytest.raises(NotPlanned, match="its code does not run on shapes alone"):
        forecast_run(settings(**{"model.attention": "varlen"}), small_config("deepseek_v32"), precision, runtime=0)


def test_a_model_that_cannot_be_built_on_shapes_is_not_planned_and_not_refused() -> None:
    """DeepSeek-V4 keeps some weights in fp32, into which torch does not change a tensor without numbers."""
    with pytest.raises(NotPlanned, match=r"its code does not run on shapes alone \(RuntimeError: _apply\(\)"):
        forecast_run(settings(), small_config("deepseek_v4"), Precision(torch.float32, torch.float32, QuantSpec()), runtime=0)


def test_each_attention_is_tried_in_order_and_the_last_reason_said() -> None:
    tried: list[str] = []

    @with_any_attention
    def forecast(config: RunConfig, model_config: Any, error: type[Exception]) -> str:
        tried.append(config.model.attention)
        raise error(f"no {config.model.attention}")

    with pytest.raises(NotPlanned, match=r"^This model cannot be planned: no eager$"):
        forecast(settings(), small_config("llama"), EnvironmentProblem)
    with pytest.raises(NotPlanned, match=r"^no eager$"):
        forecast(settings(), small_config("llama"), NotPlanned)
    assert tried == ["auto", "sdpa", "eager"] * 2
    with pytest.raises(PlanningTooLong, match="no auto"):
        forecast(settings(), small_config("llama"), PlanningTooLong)
    assert len(tried) == 7
    tried.clear()
    with pytest.raises(NotPlanned):
        forecast(settings(), small_config("mamba2"), NotPlanned)
    assert tried == ["sdpa", "eager"], "rows of recurrent layers are never packed"
    tried.clear()
    with pytest.raises(NotPlanned):
        forecast(settings(**{"model.attention": "varlen"}), small_config("mamba2"), NotPlanned)
    assert tried == ["varlen"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "becomes"), [("lfm2", "sdpa")])
def test_rows_of_recurrent_layers_are_planned_with_their_padding(family: str, becomes: str) -> None:
    """A long row and a short one take as much as two long ones, since the model is loaded with attention that pads."""
    precision, known = Precision(torch.float32, torch.float32, QuantSpec()), Workload(lengths=lambda: RowLengths(16, 20, 9, 40))

    def planned(attention: str) -> tuple[int, int, int]:
        more = {"train.micro_tokens": "32", "model.attention": attention}
        found = forecast_run(settings(**more), small_config(family), precision, runtime=0, workload=known)
        steps = next(phase for phase in found.forecast.phases if phase.name == STEP)
        return found.rows.tokens, steps.bytes, found.peak

    config, model = settings(**{"train.micro_tokens": "32"}), (small_config(family), None)
    run = TextRun(config, known, print, model)
    states = 32 * model[0].hidden_size * 4
    assert run.rows.tokens == 32 and run.batches.state_bytes == states, "as what waits on the host is counted"
    assert planned("auto") == planned(becomes)
    assert planned("auto")[0] == 32 and planned("varlen")[0] == 20

"""A run is planned with the first attention with which its model runs on shapes."""

from __future__ import annotations

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import EnvironmentProblem
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.planning.attention_choice import with_any_attention
from lorakeet.workflows.planning.forecast_text_run import forecast_run
from lorakeet.workflows.planning.planned_model import Precision
from lorakeet.workflows.planning.rehearse_text import NotPlanned, PlanningTooLong
from tiny.small_configs import small_config


def settings(**changes: str) -> RunConfig:
    given = {"model.path": "tiny", "data.train": "-", "out": "none", "lora.rank": "2", "data.max_tokens": "16"}
    return read_run(None, {**given, "train.micro_tokens": "16", **changes})


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
    def forecast(config: RunConfig, error: type[Exception]) -> str:
        tried.append(config.model.attention)
        raise error(f"no {config.model.attention}")

    with pytest.raises(NotPlanned, match=r"^This model cannot be planned: no eager$"):
        forecast(settings(), EnvironmentProblem)
    with pytest.raises(NotPlanned, match=r"^no eager$"):
        forecast(settings(), NotPlanned)
    assert tried == ["auto", "sdpa", "eager"] * 2
    with pytest.raises(PlanningTooLong, match="no auto"):
        forecast(settings(), PlanningTooLong)
    assert len(tried) == 7

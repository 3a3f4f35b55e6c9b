"""Schedulers: those of another prediction are rebuilt and change nothing else, those of another kind of model are refused."""

from __future__ import annotations

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.models.image.kinds import KINDS
from lorakeet.models.image.noise import check_betas, noising_of
from lorakeet.models.image.schedule import scheduler_for, with_defaults
from tiny.images import diffusers
from tiny.pipelines import SCHEDULE


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_prediction_rebuilds_the_scheduler(name: str) -> None:
    scheduler = getattr(diffusers(), name).from_config(SCHEDULE)
    said: list[str] = []
    assert scheduler_for(scheduler, KINDS["sd"], "auto", "m", said.append) is scheduler
    assert scheduler_for(scheduler, KINDS["sd"], "epsilon", "m", said.append) is scheduler and not said
    found = scheduler_for(scheduler, KINDS["sd"], "v_prediction", "m", said.append)
    assert said == ["m is used as predicting v_prediction, though its scheduler says epsilon."]
    assert type(found) is type(scheduler) and scheduler.config.prediction_type == "epsilon"
    own, wanted = ({key: value for key, value in one.config.items() if key[0] != "_"} for one in (found, scheduler))
    assert own == {**wanted, "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("kind", "prediction", "message"),
    [
        ("sdxl", "flow", r"diffusion\.prediction is flow, but m \(StableDiffusionXLPipeline\) predicts no flow; use auto"),
        ("sd3", "epsilon", r"diffusion\.prediction is epsilon, but m \(StableDiffusion3Pipeline\) predicts a flow; use auto"),
        ("sdxl", "auto", r"m is a StableDiffusionXLPipeline with a FlowMatchEulerDiscreteScheduler.*such as EulerDiscrete"),
    ],
)
def test_what_does_not_go_with_the_model(kind: str, prediction: str, message: str) -> None:
    flow = diffusers().FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match=message):
        scheduler_for(flow, KINDS[kind], prediction, "m", print)


def test_a_prediction_that_is_unknown_can_be_said() -> None:
    scheduler = diffusers().DDIMScheduler(**SCHEDULE, prediction_type="sample")
    with pytest.raises(ConfigError, match=r"predicts 'sample'; expected epsilon or v_prediction.*--prediction"):
        scheduler_for(scheduler, KINDS["sd"], "auto", "m", print)
    assert scheduler_for(scheduler, KINDS["sd"], "epsilon", "m", print).config.prediction_type == "epsilon"


def test_a_flow_keeps_its_own() -> None:
    flow = diffusers().FlowMatchEulerDiscreteScheduler()
    assert all(scheduler_for(flow, KINDS["flux"], prediction, "m", print) is flow for prediction in ("auto", "flow"))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_what_a_file_leaves_out_is_its_class_s(name: str) -> None:
    found = with_defaults({"_class_name": name, "prediction_type": "v_prediction"})
    own = getattr(diffusers(), name)().config
    assert found["prediction_type"] == "v_prediction" and own["beta_start"] == found["beta_start"]
    check_betas(found)
    built = getattr(diffusers(), name)()
    for config in (found, built.config):  # LCM's betas are not DDPM's
        assert torch.equal(noising_of(config, flow=False).signal, built.alphas_cumprod.float().sqrt())


def test_edms_class_brings_no_betas_and_an_unknown_one_nothing() -> None:
    with pytest.raises(ConfigError, match="EDMEulerScheduler, has no betas"):
        check_betas(with_defaults({"_class_name": "EDMEulerScheduler"}))
    assert with_defaults({"_class_name": "MineScheduler", "x": 1}) == {"_class_name": "MineScheduler", "x": 1}

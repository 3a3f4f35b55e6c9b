"""Noising against diffusers' schedulers, and what a flow's shift does."""

from __future__ import annotations

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.models.image.noise import noising_of
from tiny.images import diffusers
from tiny.pipelines import SCHEDULE


def test_diffusion_is_ddpms() -> None:
    found = noising_of(SCHEDULE, flow=False)
    alphas = diffusers().DDPMScheduler.from_config(SCHEDULE).alphas_cumprod
    assert len(found) == 1000 and torch.equal(found.times, torch.arange(1000))
    torch.testing.assert_close(found.signal**2, alphas)
    torch.testing.assert_close(found.signal**2 + found.noise**2, torch.ones(1000))
    torch.testing.assert_close(found.ratio, alphas / (1 - alphas), rtol=1e-4, atol=1e-8)
    assert found.at(torch.tensor([7])).times.tolist() == [7]


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_noise_without_betas_is_not_taken_for_ddpms(name: str) -> None:
    """DDPMScheduler.from_config would take its default, linear betas from 0.0001, without a word."""
    config = {"_class_name": name, **getattr(diffusers(), name)().config}
    with pytest.raises(ConfigError, match=f"{name}, has no betas .* put its own scheduler into"):
        noising_of(config, flow=False)


def test_betas_may_be_given_one_by_one() -> None:
    betas = [0.001 + 0.00002 * step for step in range(100)]
    found = noising_of({"trained_betas": betas, "num_train_timesteps": 100}, flow=False)
    torch.testing.assert_close(found.signal**2, torch.cumprod(1 - torch.tensor(betas), 0))


def test_a_flow_is_the_schedulers() -> None:
    for settings in ({"shift": 3.0}, {"shift": 1.0}, {"shift": 3.0, "use_dynamic_shifting": True}):
        scheduler = diffusers().FlowMatchEulerDiscreteScheduler(**settings)
        found = noising_of(scheduler.config, flow=True)
        torch.testing.assert_close(found.noise, scheduler.sigmas.flip(0))
        torch.testing.assert_close(found.times, scheduler.timesteps.flip(0))
        torch.testing.assert_close(found.signal + found.noise, torch.ones(1000))

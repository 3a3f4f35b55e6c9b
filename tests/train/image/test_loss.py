"""The loss of images against its formulas, and against diffusers' own schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from lorakeet.models.image.noise import Noising, noising_of
from lorakeet.train.image.loss import add_noise, draw, errors_of, fixed_draws, target_of, weights_of
from lorakeet.train.spec import DiffusionSpec
from tiny.images import diffusers
from tiny.pipelines import SCHEDULE

SHAPE = (4, 6, 5)


def drawn(step: int = 3, index: int = 1, spec: DiffusionSpec | None = None, seed: int = 0, **changes: object):  # type: ignore[no-untyped-def]
    given = {"variants": 4, "timesteps": 1000, "dropout": 0.5, **changes}
    return draw(SHAPE, spec or DiffusionSpec(), seed=seed, step=step, index=index, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_diffusers(prediction: str) -> None:
    schedule = {key: SCHEDULE[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler = diffusers().DDPMScheduler(**schedule, prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((3, *SHAPE), generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 400, 999])
    steps = noising_of(schedule, flow=False).at(timesteps)
    assert torch.allclose(add_noise(latents, noise, steps), scheduler.add_noise(latents, noise, timesteps), atol=1e-6)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    assert torch.allclose(target_of(latents, noise, steps, prediction), wanted, atol=1e-6)


def test_noise_of_a_flow_is_diffusers_and_its_target_leads_back() -> None:
    scheduler = diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = (torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(number)) for number in range(2))
    steps = noising_of(scheduler.config, flow=True).at(torch.tensor([0, 400, 999]))
    noisy = add_noise(latents, noise, steps)
    assert torch.allclose(noisy, scheduler.scale_noise(latents, steps.times, noise), atol=1e-6)
    velocity = target_of(latents, noise, steps, "flow")
    assert torch.allclose(noisy - steps.noise.view(-1, 1, 1, 1) * velocity, latents, atol=1e-5)
    assert torch.equal(weights_of(steps, "flow", 0.0), torch.ones(3))


def at(*alphas: float) -> Noising:
    shares = torch.tensor(alphas)
    return Noising(shares.sqrt(), (1 - shares).sqrt(), torch.zeros(len(alphas)))


def test_min_snr_weights_by_hand() -> None:
    steps = at(0.9, 0.5, 0.1)  # SNR 9, 1, 1/9
    assert torch.allclose(weights_of(steps, "epsilon", 5.0), torch.tensor([5 / 9, 1.0, 1.0]))
    assert torch.allclose(weights_of(steps, "v_prediction", 5.0), torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9)]))
    assert torch.equal(weights_of(steps, "epsilon", 0.0), torch.ones(3))


def test_a_timestep_of_pure_noise_has_a_finite_weight() -> None:
    nothing = at(0.0)
    assert weights_of(nothing, "epsilon", 5.0).tolist() == [1.0] and weights_of(nothing, "v_prediction", 5.0).tolist() == [0.0]


def test_errors_are_means_over_each_example() -> None:
    predicted, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert errors_of(predicted, target).tolist() == [1.0, 4.0]


def test_a_draw_depends_on_seed_step_and_place_alone() -> None:
    first = drawn()
    torch.manual_seed(99)
    again = drawn()
    assert torch.equal(first.noise, again.noise) and first.timestep == again.timestep and first.variant == again.variant
    for other in (drawn(step=4), drawn(index=2), drawn(seed=1)):
        assert not torch.equal(first.noise, other.noise)


def test_draws_cover_what_they_should() -> None:
    many = [drawn(step=step) for step in range(400)]
    timesteps = torch.tensor([one.timestep for one in many], dtype=torch.float64)
    assert timesteps.min() >= 0 and timesteps.max() < 1000 and 450 < timesteps.mean() < 550
    assert {one.variant for one in many} == {0, 1, 2, 3}
    assert 0.4 < sum(one.dropped for one in many) / 400 < 0.6
    assert not any(drawn(step=step, dropout=0.0).dropped for step in range(50))
    middle = [drawn(step=step, spec=DiffusionSpec(timesteps="logit-normal")).timestep for step in range(400)]
    assert torch.tensor(middle, dtype=torch.float64).std() < timesteps.std()


@pytest.mark.parametrize(
    ("timesteps", "density"),
    [
        ("uniform", torch.ones_like),
        ("cosmap", lambda share: 2 / (math.pi * (1 - 2 * share + 2 * share**2))),
        (
            "logit-normal",
            lambda share: torch.exp(-torch.logit(share) ** 2 / 2) / (math.sqrt(2 * math.pi) * share * (1 - share)),
        ),
    ],
)
def test_timesteps_have_the_densities_of_the_sd3_paper(timesteps: Any, density: Callable[[torch.Tensor], torch.Tensor]) -> None:
    spec = DiffusionSpec(timesteps=timesteps)
    found = torch.tensor([drawn(step=step, spec=spec).timestep for step in range(3000)]) / 1000
    edges = torch.linspace(0, 1, 6)
    counts = torch.histc(found, bins=5, min=0, max=1) / len(found)
    middles = torch.linspace(0.0005, 0.9995, 1000)
    wanted = torch.stack([density(middles[(middles > low) & (middles < high)]).sum() for low, high in pairwise(edges)]) / 1000
    assert (counts - wanted).abs().max() < 0.03


def test_mode_prefers_the_middle_and_stays_within() -> None:
    found = torch.tensor([drawn(step=step, spec=DiffusionSpec(timesteps="mode")).timestep for step in range(1500)]) / 1000
    middle = ((found > 0.3) & (found < 0.7)).float().mean()
    assert middle > 0.5 and found.min() < 0.1 and found.max() > 0.9


def test_noise_offset_shifts_whole_channels() -> None:
    plain, shifted = drawn(), drawn(spec=DiffusionSpec(noise_offset=0.5))
    apart = (shifted.noise - plain.noise).flatten(1)
    assert torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-6) and (apart[:, 0].abs() > 0).all()


def test_fixed_draws_are_spread_and_depend_on_the_key() -> None:
    timesteps, noises = fixed_draws(SHAPE, "a", count=4, timesteps=1000)
    assert timesteps.tolist() == [125, 375, 625, 875] and noises.shape == (4, *SHAPE)
    assert torch.equal(noises, fixed_draws(SHAPE, "a", count=4, timesteps=1000)[1])
    assert not torch.equal(noises, fixed_draws(SHAPE, "b", count=4, timesteps=1000)[1])

"""The loss of images against its formulas, and against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch

from lorakeet.train.image_loss import add_noise, draw, errors_of, fixed_draws, target_of, weights_of
from lorakeet.train.image_spec import DiffusionSpec
from tiny.images import diffusers
from tiny.pipelines import SCHEDULE

SHAPE = (4, 6, 5)


def drawn(step: int = 3, place: int = 1, spec: DiffusionSpec | None = None, seed: int = 0, **changes: object):  # type: ignore[no-untyped-def]
    given = {"variants": 4, "timesteps": 1000, "dropout": 0.5, **changes}
    return draw(SHAPE, spec or DiffusionSpec(), seed=seed, step=step, place=place, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_diffusers(prediction: str) -> None:
    schedule = {key: SCHEDULE[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler = diffusers().DDPMScheduler(**schedule, prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((3, *SHAPE), generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 400, 999])
    alphas = scheduler.alphas_cumprod[timesteps]
    assert torch.allclose(add_noise(latents, noise, alphas), scheduler.add_noise(latents, noise, timesteps), atol=1e-6)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    assert torch.allclose(target_of(latents, noise, alphas, prediction), wanted, atol=1e-6)


def test_min_snr_weights_by_hand() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.1])  # SNR 9, 1, 1/9
    assert torch.allclose(weights_of(alphas, "epsilon", 5.0), torch.tensor([5 / 9, 1.0, 1.0]))
    assert torch.allclose(weights_of(alphas, "v_prediction", 5.0), torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9)]))
    assert torch.equal(weights_of(alphas, "epsilon", 0.0), torch.ones(3))


def test_a_timestep_of_pure_noise_has_a_finite_weight() -> None:
    nothing = torch.tensor([0.0])
    assert weights_of(nothing, "epsilon", 5.0).tolist() == [1.0] and weights_of(nothing, "v_prediction", 5.0).tolist() == [0.0]


def test_errors_are_means_over_each_example() -> None:
    predicted, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert errors_of(predicted, target).tolist() == [1.0, 4.0]


def test_a_draw_depends_on_seed_step_and_place_alone() -> None:
    first = drawn()
    torch.manual_seed(99)
    again = drawn()
    assert torch.equal(first.noise, again.noise) and first.timestep == again.timestep and first.variant == again.variant
    for other in (drawn(step=4), drawn(place=2), drawn(seed=1)):
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


def test_noise_offset_shifts_whole_channels() -> None:
    plain, shifted = drawn(), drawn(spec=DiffusionSpec(noise_offset=0.5))
    apart = (shifted.noise - plain.noise).flatten(1)
    assert torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-6) and (apart[:, 0].abs() > 0).all()


def test_fixed_draws_are_spread_and_depend_on_the_key() -> None:
    timesteps, noises = fixed_draws(SHAPE, "a", count=4, timesteps=1000)
    assert timesteps.tolist() == [125, 375, 625, 875] and noises.shape == (4, *SHAPE)
    assert torch.equal(noises, fixed_draws(SHAPE, "a", count=4, timesteps=1000)[1])
    assert not torch.equal(noises, fixed_draws(SHAPE, "b", count=4, timesteps=1000)[1])

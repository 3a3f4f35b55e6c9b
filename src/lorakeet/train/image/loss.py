"""The diffusion loss: noise is added to latents, and the model's prediction is compared with the target.

x are the clean latents, ε is standard normal noise, a_t and b_t are signal and noise of step t (models/image/noise):

    noisy      x_t = a_t·x + b_t·ε
    target     ε, or v = a_t·ε − b_t·x (arXiv 2202.00512), or of a flow the velocity ε − x (arXiv 2210.02747, 2403.03206)
    SNR        a_t² / b_t²
    weight     min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v      (arXiv 2303.09556); 1 for flows
    step       u·steps for u uniform; sigmoid(n) for normal n; 1 − u − 1.29·(cos²(πu/2) − 1 + u); 1 − 1/(tan(πu/2) + 1):
               "logit-normal", "mode" and "cosmap" of the SD3 paper (arXiv 2403.03206), which for flows weighs the steps
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.core.initialise import seed_for
from lorakeet.models.image.noise import Noising
from lorakeet.train.spec import DiffusionSpec

MODE_SCALE = 1.29  # the best value in the SD3 paper


@dataclass(frozen=True)
class Draw:
    """The random draw for one picture of one step."""

    timestep: int
    variant: int
    dropped: bool  # true if the caption is left out
    noise: Tensor  # (channels, h, w)


def draw(
    shape: tuple[int, ...],
    spec: DiffusionSpec,
    *,
    seed: int,
    step: int,
    index: int,
    variants: int,
    timesteps: int,
    dropout: float,
) -> Draw:
    """The draw for picture `index` of step `step`: a function of these and `seed` alone.

    `shape` is that of one latent, `variants` the number of crops, `timesteps` the number of timesteps.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, f"picture {index} of step {step}"))
    chance = torch.rand(3, generator=generator, dtype=torch.float64)
    position = float(chance[0])
    if spec.timesteps == "logit-normal":
        position = float(torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64)))
    elif spec.timesteps == "mode":
        position = 1 - position - MODE_SCALE * (math.cos(math.pi * position / 2) ** 2 - 1 + position)
    elif spec.timesteps == "cosmap":
        position = 1 - 1 / (math.tan(math.pi * position / 2) + 1)
    noise = torch.randn(shape, generator=generator)
    if spec.noise_offset:
        noise = noise + spec.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    return Draw(
        timestep=min(max(int(position * timesteps), 0), timesteps - 1),
        variant=min(int(chance[1] * variants), variants - 1),
        dropped=bool(chance[2] < dropout),
        noise=noise,
    )


def fixed_draws(shape: tuple[int, ...], key: str, *, count: int, timesteps: int) -> tuple[Tensor, Tensor]:
    """Evenly spread timesteps (count,) and noises (count, channels, h, w), both functions of `key`."""
    generator = torch.Generator().manual_seed(seed_for(0, f"held-out {key}"))
    spread = ((torch.arange(count, dtype=torch.float64) + 0.5) * timesteps / count).long()
    return spread, torch.randn((count, *shape), generator=generator)


def add_noise(latents: Tensor, noise: Tensor, at: Noising) -> Tensor:
    """x_t of the table above; latents and noise (n, channels, h, w), `at` the step of each."""
    return _wide(at.signal, latents) * latents + _wide(at.noise, latents) * noise


def target_of(latents: Tensor, noise: Tensor, at: Noising, prediction: str) -> Tensor:
    """The target of the model at x_t: ε, v for `v_prediction`, the velocity for `flow`. Shapes as in `add_noise`."""
    if prediction == "epsilon":
        return noise
    if prediction == "flow":
        return noise - latents
    return _wide(at.signal, latents) * noise - _wide(at.noise, latents) * latents


def weights_of(at: Noising, prediction: str, gamma: float) -> Tensor:
    """The weight (n,) of each example; all 1 where `gamma` is 0.

    Without signal (SNR 0, a schedule that ends in pure noise), ε's weight is its limit, 1.
    """
    snr = at.ratio
    if not gamma:
        return torch.ones_like(snr)
    capped = snr.clamp(max=gamma)
    if prediction == "v_prediction":
        return capped / (snr + 1)
    return torch.where(snr > 0, capped / snr.clamp(min=torch.finfo(snr.dtype).tiny), torch.ones_like(snr))


def errors_of(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each example (n,), over channels and pixels, in fp32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def _wide(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(like.device, like.dtype).view(-1, 1, 1, 1)

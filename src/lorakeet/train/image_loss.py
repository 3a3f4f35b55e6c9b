"""The loss of images: noise is added to latents, and the model's guess of it is compared with what it should have been.

ᾱ_t is the share of the signal that is left at timestep t, x the clean latents, ε standard normal noise (DDPM, arXiv 2006.11239):

    noisy      x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε
    target     ε, or v = √ᾱ_t·ε − √(1 − ᾱ_t)·x      (arXiv 2202.00512)
    SNR        ᾱ_t / (1 − ᾱ_t)
    weight     min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v      (arXiv 2303.09556)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.core.start import seed_for
from lorakeet.train.image_spec import DiffusionSpec


@dataclass(frozen=True)
class Draw:
    """What chance decides about one picture of one step."""

    timestep: int
    variant: int
    dropped: bool  # the caption is left out
    noise: Tensor  # (channels, h, w)


def draw(
    shape: tuple[int, ...],
    spec: DiffusionSpec,
    *,
    seed: int,
    step: int,
    place: int,
    variants: int,
    timesteps: int,
    dropout: float,
) -> Draw:
    """The draw for the picture at `place` of step `step`: a function of these and `seed`, whatever ran before.

    `shape` is that of one latent, `variants` the number of cut-outs to choose from, `timesteps` how many there are.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, f"picture {place} of step {step}"))
    chance = torch.rand(3, generator=generator, dtype=torch.float64)
    position = chance[0]
    if spec.timesteps == "logit-normal":
        position = torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64))
    noise = torch.randn(shape, generator=generator)
    if spec.noise_offset:
        noise = noise + spec.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    return Draw(
        timestep=min(int(position * timesteps), timesteps - 1),
        variant=min(int(chance[1] * variants), variants - 1),
        dropped=bool(chance[2] < dropout),
        noise=noise,
    )


def fixed_draws(shape: tuple[int, ...], key: str, *, count: int, timesteps: int) -> tuple[Tensor, Tensor]:
    """Timesteps (count,) evenly spread and noises (count, channels, h, w) that depend on `key` alone."""
    generator = torch.Generator().manual_seed(seed_for(0, f"held-out {key}"))
    spread = ((torch.arange(count, dtype=torch.float64) + 0.5) * timesteps / count).long()
    return spread, torch.randn((count, *shape), generator=generator)


def add_noise(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """x_t of the table above; latents and noise (n, channels, h, w), alphas ᾱ_t (n,)."""
    alphas = _wide(alphas, latents)
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise


def target_of(latents: Tensor, noise: Tensor, alphas: Tensor, prediction: str) -> Tensor:
    """What the model should predict of x_t: ε, or v for `v_prediction`. Shapes as in `add_noise`."""
    if prediction == "epsilon":
        return noise
    alphas = _wide(alphas, latents)
    return alphas.sqrt() * noise - (1 - alphas).sqrt() * latents


def weights_of(alphas: Tensor, prediction: str, gamma: float) -> Tensor:
    """The weight (n,) of each example; all 1 where `gamma` is 0.

    Where no signal is left (SNR 0, a schedule that ends in pure noise), ε's weight is its limit, 1.
    """
    if not gamma:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    capped = snr.clamp(max=gamma)
    if prediction == "v_prediction":
        return capped / (snr + 1)
    return torch.where(snr > 0, capped / snr.clamp(min=torch.finfo(snr.dtype).tiny), torch.ones_like(snr))


def errors_of(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each example (n,), over channels and places, in fp32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def _wide(alphas: Tensor, like: Tensor) -> Tensor:
    return alphas.to(like.device, like.dtype).view(-1, 1, 1, 1)

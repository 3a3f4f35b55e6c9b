"""How latents x are noised: x_t = signal_t·x + noise_t·ε, and what the model is told of t. Diffusion and rectified flow alike.

    diffusion         signal √ᾱ_t, noise √(1 − ᾱ_t), told t                      (DDPM, arXiv 2006.11239)
    rectified flow    signal 1 − σ_t, noise σ_t, told 1000·σ_t                    (SD3, arXiv 2403.03206)
                      σ_t = s·u / (1 + (s − 1)·u) for u = t/1000 and the scheduler's shift s
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError
from lorakeet.models.image.diffusers_import import diffusers

_DEFAULTS = "_use_default_values"  # of a built one: what its file left out, for which from_config would take its own class's


@dataclass(frozen=True)
class Noising:
    """The steps of training, least noise first; three tensors (steps,), fp32 on the CPU."""

    signal: Tensor
    noise: Tensor
    times: Tensor

    def __len__(self) -> int:
        return len(self.times)

    def at(self, steps: Tensor) -> Noising:
        """Those of the examples (n,) whose numbers are `steps`."""
        return Noising(self.signal[steps], self.noise[steps], self.times[steps])

    @property
    def ratio(self) -> Tensor:
        """The signal-to-noise ratio of each step."""
        return (self.signal / self.noise).square()


def check_betas(scheduler: Mapping[str, Any]) -> None:
    """ConfigError where a scheduler has no betas, of which DDPM's steps are made: diffusers would assume some.

    `scheduler` is the configuration of one that was built (`image_schedule.filled`): a file may leave betas to its class.
    """
    if scheduler.get("trained_betas") is None and not {"beta_start", "beta_schedule"} & set(scheduler):
        raise ConfigError(
            f"The model's scheduler, {scheduler.get('_class_name', 'of no class')}, has no betas (beta_start, beta_schedule, "
            "trained_betas): its noise is not DDPM's, and such models (EDM) cannot be trained here, only drawn with. If the "
            "model was trained with betas, put its own scheduler into model_index.json and scheduler/scheduler_config.json."
        )


def noising_of(scheduler: Mapping[str, Any], *, flow: bool) -> Noising:
    """The noising that a scheduler's configuration describes; of a flow without its shift where that depends on the size.

    ConfigError where it describes none (`check_betas`).
    """
    if not flow:
        check_betas(scheduler)
        told = {key: value for key, value in scheduler.items() if key != _DEFAULTS}
        alphas = diffusers().DDPMScheduler.from_config(told).alphas_cumprod.float()
        return Noising(alphas.sqrt(), (1 - alphas).sqrt(), torch.arange(len(alphas)))
    count = int(scheduler.get("num_train_timesteps", 1000))
    shift = 1.0 if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))
    share = torch.arange(1, count + 1, dtype=torch.float32) / count
    sigmas = shift * share / (1 + (shift - 1) * share)
    return Noising(1 - sigmas, sigmas, sigmas * count)

"""Noise of latents x: x_t = signal_t·x + noise_t·ε, and the model's time input, for diffusion and rectified flow.

    diffusion         signal √ᾱ_t, noise √(1 − ᾱ_t), time t                      (DDPM, arXiv 2006.11239)
    rectified flow    signal 1 − σ_t, noise σ_t, time 1000·σ_t                    (SD3, arXiv 2403.03206)
                      σ_t = s·u / (1 + (s − 1)·u) for u = t/1000 and the scheduler's shift s
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError
from lorakeet.kinds.images.model.diffusers_import import diffusers

_DEFAULTS = (
    "_use_default_values"  # key of a built scheduler: settings that from_config would replace by the defaults of its own class
)


@dataclass(frozen=True)
class Noising:
    """The steps of training, least noise first; three tensors (steps,), fp32 on the CPU."""

    signal: Tensor
    noise: Tensor
    times: Tensor

    def __len__(self) -> int:
        return len(self.times)

    def at(self, steps: Tensor) -> Noising:
        """Returns the noising of the given `steps` (n,)."""
        return Noising(self.signal[steps], self.noise[steps], self.times[steps])

    @property
    def ratio(self) -> Tensor:
        """The signal-to-noise ratio of each step, (steps,)."""
        return (self.signal / self.noise).square()


def check_betas(scheduler: Mapping[str, Any]) -> None:
    """Raises ConfigError if a scheduler has no betas, which DDPM's steps need: diffusers would assume some.

    `scheduler` is a configuration with defaults (`schedule.with_defaults`): a file may leave betas to its class.
    """
    if scheduler.get("trained_betas") is None and not {"beta_start", "beta_schedule"} & set(scheduler):
        raise ConfigError(
            f"The model's scheduler, {scheduler.get('_class_name', 'of no class')}, has no betas (beta_start, beta_schedule, "
            "trained_betas): its noise is not DDPM's, and such models (EDM) cannot be trained here, only drawn with. If the "
            "model was trained with betas, put its own scheduler into model_index.json and scheduler/scheduler_config.json."
        )


def noising_of(scheduler: Mapping[str, Any], *, flow: bool) -> Noising:
    """Returns the noising of a scheduler's configuration; of a flow without its shift if that depends on the size.

    Raises ConfigError if it has none (`check_betas`).
    """
    if not flow:
        check_betas(scheduler)
        settings = {key: value for key, value in scheduler.items() if key != _DEFAULTS}
        alphas = diffusers().DDPMScheduler.from_config(settings).alphas_cumprod.float()
        return Noising(alphas.sqrt(), (1 - alphas).sqrt(), torch.arange(len(alphas)))
    count = int(scheduler.get("num_train_timesteps", 1000))
    shift = 1.0 if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))
    share = torch.arange(1, count + 1, dtype=torch.float32) / count
    sigmas = shift * share / (1 + (shift - 1) * share)
    return Noising(1 - sigmas, sigmas, sigmas * count)

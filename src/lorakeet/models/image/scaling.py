"""Scales an autoencoder's output to the denoiser's latents and back, as diffusers' pipelines do.

    SD, SD3, FLUX    x = s·(z − shift)                  s and shift: scaling_factor, shift_factor
    SDXL             x = s·(z − mean) / std             if the configuration has latents_mean and latents_std, by channel
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.models.image.kinds import ImageKind


def scaled_latents(latents: Tensor, config: Any, kind: ImageKind) -> Tensor:
    """Returns the denoiser's latents of the autoencoder's output (n, channels, h, w)."""
    shift, factor = _terms(latents, config, kind)
    return (latents - shift) * factor


def unscaled(latents: Tensor, config: Any, kind: ImageKind) -> Tensor:
    """Returns the inverse of `scaled_latents`."""
    shift, factor = _terms(latents, config, kind)
    return latents / factor + shift


def scaling_note(config: Any, kind: ImageKind) -> str:
    """Returns a text of everything that `scaled_latents` depends on, for a digest."""
    note = f"{config.scaling_factor} {getattr(config, 'shift_factor', None)}"
    return f"{note} {list(config.latents_mean)} {list(config.latents_std)}" if _standardised(config, kind) else note


def _terms(latents: Tensor, config: Any, kind: ImageKind) -> tuple[Tensor | float, Tensor | float]:
    """Returns the shift and the factor."""
    if not _standardised(config, kind):
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, config.scaling_factor / std


def _standardised(config: Any, kind: ImageKind) -> bool:
    """True if means and deviations are used: diffusers' pipelines of other kinds ignore them."""
    means, deviations = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    return kind.name == "sdxl" and means is not None and deviations is not None

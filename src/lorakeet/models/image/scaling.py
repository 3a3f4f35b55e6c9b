"""From the numbers of an autoencoder to the latents that the denoiser was trained on, as diffusers' pipelines take them back.

    SD, SD3, FLUX    x = s·(z − shift)                  s and shift: scaling_factor, shift_factor
    SDXL             x = s·(z − mean) / std             where latents_mean and latents_std are there, one number a channel
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.models.image.kinds import ImageKind


def scaled_latents(latents: Tensor, config: Any, kind: ImageKind) -> Tensor:
    """What the autoencoder gave, (n, channels, h, w), as the denoiser's latents."""
    shift, factor = _terms(latents, config, kind)
    return (latents - shift) * factor


def unscaled(latents: Tensor, config: Any, kind: ImageKind) -> Tensor:
    """The inverse of `scaled_latents`."""
    shift, factor = _terms(latents, config, kind)
    return latents / factor + shift


def scaling_note(config: Any, kind: ImageKind) -> str:
    """All that `scaled_latents` depends on, in words; latents are the same where it and the autoencoder's numbers are."""
    note = f"{config.scaling_factor} {getattr(config, 'shift_factor', None)}"
    return f"{note} {list(config.latents_mean)} {list(config.latents_std)}" if _standardised(config, kind) else note


def _terms(latents: Tensor, config: Any, kind: ImageKind) -> tuple[Tensor | float, Tensor | float]:
    """The shift and the factor."""
    if not _standardised(config, kind):
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, config.scaling_factor / std


def _standardised(config: Any, kind: ImageKind) -> bool:
    """Whether means and deviations count: diffusers' pipelines of the other kinds do not look at them."""
    means, deviations = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    return kind.name == "sdxl" and means is not None and deviations is not None

"""Samples of the base for DreamBooth's prior preservation: images of the subject's class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.data.images.folder import ImageRow
from lorakeet.data.images.spec import ImageSpec
from lorakeet.models.image.latent_cache import EncodedImage, cache_in, cached_tensors
from lorakeet.models.image.model import ImageModel
from lorakeet.models.image.sample import Sampler, draw_latents, require_finite_latents


def drawn_prior(
    model: ImageModel,
    spec: ImageSpec,
    sampler: Sampler,
    *,
    say: Callable[[str], None],
    progress: Callable[[int], None] | None = None,
) -> list[EncodedImage]:
    """Returns `spec.prior_count` samples of `spec.prior_caption` as latents, seeds 0, 1, …, cached. No adapter may be active."""
    caption, count = spec.prior_caption, spec.prior_count
    height, width = sampler.size or (model.resolution, model.resolution)
    scheduler = model.pipeline.scheduler
    settings = sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))
    steps = f"{type(scheduler).__name__} {settings}"
    drawn = (height, width, sampler.steps, sampler.strength(model), count, steps)
    key = " ".join(map(str, (model.denoiser_digest, model.encoders_digest, model.dtype, *drawn))) + f"\n{caption}"

    def make() -> dict[str, Tensor]:
        say(f"The base samples {count} images of '{caption}'; they are cached for other runs.")
        latents = draw_latents(model, [caption] * count, list(range(count)), sampler, progress=progress)
        return {"latents": require_finite_latents(model, latents).cpu()}

    latents = cached_tensors(cache_in(spec, "prior"), key, make, say)["latents"]
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    names = [hashlib.sha256(f"{key}\n{seed}".encode()).hexdigest() for seed in range(count)]
    rows = [ImageRow(Path(), caption, width, height, name, 0, f"drawn with seed {seed}") for seed, name in enumerate(names)]
    return [EncodedImage(row, one[None], sizes) for row, one in zip(rows, latents, strict=True)]

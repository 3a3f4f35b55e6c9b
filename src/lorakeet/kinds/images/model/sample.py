"""Samples images: the same noise for the same seed, with its own adapters and weights for each image of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.core.layers.linear import LoraConv2d
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.selection import Share
from lorakeet.errors import ConfigError, DataError
from lorakeet.kinds.images.model.diffusers_import import quiet_diffusers
from lorakeet.kinds.images.model.kinds import Conditioning, packed_latents, unpacked_latents
from lorakeet.kinds.images.model.model import ImageModel
from lorakeet.models.inject import adapter_names, has_adapter, selection_of
from lorakeet.models.modules import adapted_layers

Mix = Mapping[str, float]  # adapters with their weights; empty for the base


@dataclass(frozen=True)
class Sampler:
    """Sampling settings: steps of the model's own scheduler, classifier-free guidance (1 is off; None: the default of the model's
    kind), negative prompt, size in pixels."""

    steps: int = 30
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None  # height and width; None: those of the model's training images
    at_once: int = 4

    def strength(self, model: ImageModel) -> float:
        """Returns the guidance scale for `model`."""
        return model.kind.guidance if self.guidance is None else self.guidance


def draw_latents(
    model: ImageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    *,
    mixes: Sequence[Mix] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Returns latents (n, channels, h, w), fp32, of one image for each prompt and seed.

    Up to rounding, an image does not depend on the others in its batch. `mixes` are the adapters of each image; by default all
    use the active one. The selection is restored afterwards. Raises ConfigError if adapters cannot differ within a batch
    (`why_not_mixed`).
    """
    if sampler.negative and not model.kind.negative:
        raise ConfigError(f"{model.name} takes its guidance as a number and has no negative prompt; leave it out.")
    most = int(model.pipeline.scheduler.config.num_train_timesteps)
    if sampler.steps > most:
        raise ConfigError(f"{sampler.steps} steps are requested, but the scheduler of {model.name} has {most}; take fewer.")
    if mixes is not None:
        _check_mixes(model, mixes)
    model.parts.eval()
    selection = selection_of(model.parts)
    before = selection.active
    parts = [slice(at, at + sampler.at_once) for at in range(0, len(prompts), sampler.at_once)]
    shares = [None if mixes is None else mixes[part] for part in parts]
    found = []
    try:
        with torch.no_grad():
            embedded = [_embedded(model, prompts[part], sampler, mix) for part, mix in zip(parts, shares, strict=True)]
            with model.drawing():
                for part, texts, mix in zip(parts, embedded, shares, strict=True):
                    found.append(_batch(model, texts, seeds[part], sampler, mix))
                    if progress:
                        progress(len(seeds[part]))
    finally:
        selection.use(before)
    return torch.cat(found)


def require_finite_latents(model: ImageModel, latents: Tensor) -> Tensor:
    """Returns the latents (n, …); DataError if one is not finite, which a decoder turns black."""
    broken = int((~latents.isfinite().flatten(1).all(1)).sum())
    if broken:
        narrow = "float16 ends at 65504; take model.dtype (--dtype) bfloat16 or float32. " if model.dtype == torch.float16 else ""
        raise DataError(
            f"{broken} of {len(latents)} images of {model.name} in {str(model.dtype).removeprefix('torch.')} are not finite. "
            f"{narrow}Else weights of the model or of an adapter are not finite, or too large."
        )
    return latents


def why_not_mixed(model: ImageModel, mixes: Sequence[Mix]) -> str:
    """Returns the reason why these mixes cannot share a batch or cannot be weighted; empty if they can.

    One adapter at weight 1, or none, for all images is no mix and always works.
    """
    if len({_single(mix) for mix in mixes}) == 1 and _single(mixes[0]) is not None:
        return ""
    names = {name for mix in mixes for name in mix}
    for path, layer in adapted_layers(model.parts):
        for name in names & set(layer.adapters):
            if isinstance(layer, LoraConv2d):
                return f"'{name}' changes the convolution {path}, and a convolution has one adapter for a whole batch"
            if not cast(LoraPair, layer.adapters[name]).plain:
                return f"'{name}' has more than A and B on {path} (DoRA, a bias or dropout), which has no weighted sum"
    return ""


def _embedded(model: ImageModel, prompts: Sequence[str], sampler: Sampler, mixes: Sequence[Mix] | None) -> dict[str, Any]:
    """Returns the arguments of diffusers' pipeline for one batch's prompts."""
    _select(model, mixes, 1)
    return _texts(model.describe(prompts), model.describe([sampler.negative] * len(prompts)) if _guided(model, sampler) else None)


def _guided(model: ImageModel, sampler: Sampler) -> bool:
    """True if the denoiser computes each image with and without its prompt; FLUX takes the guidance as a number."""
    return sampler.strength(model) > 1 and model.kind.negative


def _batch(
    model: ImageModel, texts: Mapping[str, Any], seeds: Sequence[int], sampler: Sampler, mixes: Sequence[Mix] | None
) -> Tensor:
    height, width = sampler.size or (model.resolution, model.resolution)
    shape = (int(model.vae.config.latent_channels), height // model.factor, width // model.factor)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    guided, flux = _guided(model, sampler), model.kind.name == "flux"
    _select(model, mixes, 2 if guided else 1)
    with quiet_diffusers():
        found = model.pipeline(
            **texts,
            latents=(packed_latents(noise) if flux else noise).to(model.device, model.dtype),
            generator=generators,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.strength(model) if guided or not model.kind.negative else 1.0,
            height=height,
            width=width,
            output_type="latent",
        ).images
    return (unpacked_latents(found, *shape[1:]) if flux else cast(Tensor, found)).float()


def _texts(prompts: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Returns the arguments of diffusers' pipelines for embeddings instead of prompts."""
    texts: dict[str, Any] = {"prompt_embeds": prompts.states}
    if prompts.pooled is not None:
        texts["pooled_prompt_embeds"] = prompts.pooled
    if negative is not None:
        texts["negative_prompt_embeds"] = negative.states
        if negative.pooled is not None:
            texts["negative_pooled_prompt_embeds"] = negative.pooled
    return texts


def _check_mixes(model: ImageModel, mixes: Sequence[Mix]) -> None:
    unknown = [name for name in sorted({name for mix in mixes for name in mix}) if not has_adapter(model.parts, name)]
    if unknown:
        known = ", ".join(adapter_names(model.parts)) or "none"
        raise ConfigError(f"No adapter {', '.join(unknown)} is on the model (it has {known}).")
    if why := why_not_mixed(model, mixes):
        raise ConfigError(f"These images cannot be sampled in one batch: {why}. Sample one mix at a time.")


def _single(mix: Mix) -> str | None:
    """Returns the only adapter of a mix, "" for the base, None for a weighted mix."""
    if not mix:
        return ""
    return next(iter(mix)) if list(mix.values()) == [1.0] else None


def _select(model: ImageModel, mixes: Sequence[Mix] | None, times: int) -> None:
    """Selects each image's mix; the batch repeats the images `times` times (unguided, then guided)."""
    if mixes is None:
        return
    selection = selection_of(model.parts)
    first = _single(mixes[0])
    if first is not None and all(_single(mix) == first for mix in mixes):
        selection.use(first or None)
        return
    count = len(mixes)
    shares: list[Share] = []
    for number in range(count * times):
        for name, weight in mixes[number % count].items():
            last = next((share for share in reversed(shares) if share.name == name), None)
            if last is not None and last.stop == number and last.weight == weight:
                shares[shares.index(last)] = Share(last.start, number + 1, name, weight)
            else:
                shares.append(Share(number, number + 1, name, weight))
    selection.divide(shares, units=count * times)

"""The kinds of image models in diffusers: parts and arguments of Stable Diffusion, SDXL, SD3 and FLUX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

FLUX_GUIDANCE = 3.5  # of FLUX.1-dev in training: the scale that it was distilled at, as in diffusers' own script
FLUX_SIDE = 128  # latents per side of FLUX's training images, which its configuration lacks
UNET, TRANSFORMER = "unet", "transformer"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class ImageKind:
    """One kind of pipeline. `flow` models predict a velocity, others noise or v.

    `pooled` is the index of pooled vectors in the result of `encode_prompt`. `reads` is the number of caption tokens of the
    longest encoder (0: CLIP's tokenizer says). `guidance` is the default of diffusers' pipeline.
    """

    name: str
    pipeline: str  # diffusers' class
    denoiser: str = UNET
    flow: bool = False
    pooled: int | None = None
    prompts: Mapping[str, Any] = field(default_factory=dict)  # further arguments of encode_prompt
    reads: int = 0
    guidance: float = 7.5
    negative: bool = True  # whether it has negative prompts: not if the model takes the guidance as a number


_ALONE = {"do_classifier_free_guidance": False}
_ONE_PROMPT = {"prompt_2": None, "prompt_3": None}
KINDS: dict[str, ImageKind] = {
    kind.name: kind
    for kind in (
        ImageKind("sd", "StableDiffusionPipeline", prompts=_ALONE),
        ImageKind("sdxl", "StableDiffusionXLPipeline", pooled=2, prompts=_ALONE, guidance=5.0),
        ImageKind("sd3", "StableDiffusion3Pipeline", TRANSFORMER, True, 2, {**_ALONE, **_ONE_PROMPT}, 256, 7.0),
        ImageKind("flux", "FluxPipeline", TRANSFORMER, True, 1, {"prompt_2": None}, 512, FLUX_GUIDANCE, negative=False),
    )
}
NOT_LOADED = ("safety_checker", "feature_extractor")  # parts of Stable Diffusion 1 that nothing here uses
PIPELINES: dict[str, ImageKind] = {kind.pipeline: kind for kind in KINDS.values()}


@dataclass(frozen=True)
class Conditioning:
    """The embeddings of n captions: states (n, tokens, width), and but for SD 1.x/2.x pooled vectors (n, width)."""

    states: Tensor
    pooled: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.states.to(device, dtype), pooled)


def predicted(kind: ImageKind, denoiser: Any, noisy: Tensor, times: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
    """Returns the prediction (n, channels, h, w) of `denoiser` for `noisy`; `times` (n,) are 0 to 1000, sizes (n, 6) SDXL's."""
    if kind.name == "flux":
        return _flux(denoiser, noisy, times, conditioning)
    if kind.name == "sd3":
        found = denoiser(
            hidden_states=noisy, timestep=times, encoder_hidden_states=conditioning.states,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )  # fmt: skip
        return cast(Tensor, found[0])
    added = {"text_embeds": conditioning.pooled, "time_ids": sizes} if kind.name == "sdxl" else None
    found = denoiser(noisy, times, encoder_hidden_states=conditioning.states, added_cond_kwargs=added, return_dict=False)
    return cast(Tensor, found[0])


def _flux(denoiser: Any, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
    height, width = noisy.shape[-2:]
    positions = torch.zeros(height // 2, width // 2, 3, device=noisy.device, dtype=noisy.dtype)
    positions[..., 1] += torch.arange(height // 2, device=noisy.device, dtype=noisy.dtype)[:, None]
    positions[..., 2] += torch.arange(width // 2, device=noisy.device, dtype=noisy.dtype)[None, :]
    guidance = torch.full((len(noisy),), FLUX_GUIDANCE, device=noisy.device) if denoiser.config.guidance_embeds else None
    found = denoiser(
        hidden_states=packed_latents(noisy), timestep=times / 1000, guidance=guidance, pooled_projections=conditioning.pooled,
        encoder_hidden_states=conditioning.states, txt_ids=torch.zeros(conditioning.states.shape[1], 3, device=noisy.device,
        dtype=noisy.dtype),
        img_ids=positions.flatten(0, 1), return_dict=False,
    )[0]  # fmt: skip
    return unpacked_latents(found, height, width)


def packed_latents(latents: Tensor) -> Tensor:
    """Returns latents (n, channels, h, w) in FLUX's order (n, h/2·w/2, 4·channels), each token a 2×2 patch."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, height // 2 * (width // 2), 4 * channels)


def unpacked_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed_latents` for latents of h × w positions."""
    count, _, channels = tokens.shape
    patches = tokens.view(count, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, channels // 4, height, width)

"""Builds an image model from its configurations alone: shapes without weights, for planning before anything is loaded.

Inside a memory.ledger.Ledger its tensors take no memory; outside they are real and random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lorakeet.kinds.images.model.denoiser import packing_of_denoiser
from lorakeet.kinds.images.model.diffusers_import import diffusers, new_denoiser, quiet_diffusers
from lorakeet.kinds.images.model.kinds import ENCODERS, PIPELINES, Conditioning
from lorakeet.kinds.images.model.model import ImageModel
from lorakeet.kinds.images.model.noise import check_betas
from lorakeet.kinds.images.model.schedule import with_defaults
from lorakeet.kinds.images.model.shapes import Shapes, shapes_in
from lorakeet.kinds.images.model.single_file import open_single
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import put_packed
from lorakeet.quant.spec import QuantSpec

_CLIP = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


def shapes_of_images(spec: ModelSpec, say: Callable[[str], None]) -> Shapes:
    """Returns the configurations of the pipeline `spec.path`; reads and fetches no weights.

    They are those of a single file, a folder, a published shape (without network), or a hub id. Raises ConfigError if there are
    none.
    """
    single = open_single(spec, say)
    return shapes_in(spec.path, spec.revision, say) if single is None else single.shapes


@dataclass(frozen=True)
class ShapeImageModel(ImageModel):
    """An ImageModel without tokenizers: captions are made-up ids of the text encoders' length."""

    def describe(self, captions: Sequence[str]) -> Conditioning:
        self.stage_to_describe()
        found = {name: self._read(name, len(captions)) for name in ENCODERS if name in self.parts}
        if self.kind.name == "sd":
            return Conditioning(found["text_encoder"][0])
        if self.kind.name == "flux":
            return Conditioning(found["text_encoder_2"][0], found["text_encoder"].pooler_output)
        clip = [found[name] for name in ENCODERS[:2]]
        states = torch.cat([one.hidden_states[-2] for one in clip], dim=-1)
        if self.kind.name == "sdxl":
            return Conditioning(states, clip[1][0])
        width = int(self.denoiser.config.joint_attention_dim)
        nothing = states.new_zeros(len(captions), self.kind.reads, width)
        read = found["text_encoder_3"][0] if "text_encoder_3" in found else nothing
        wide = nn.functional.pad(states, (0, width - states.shape[-1]))
        return Conditioning(torch.cat([wide, read], dim=1), torch.cat([one[0] for one in clip], dim=-1))

    def _read(self, name: str, count: int) -> Any:
        encoder: Any = self.parts[name]
        tokens = getattr(encoder.config, "max_position_embeddings", self.kind.reads)
        ids = torch.ones(count, int(tokens), dtype=torch.long, device=self.device)
        return encoder(ids, output_hidden_states=self.kind.name in ("sdxl", "sd3"))


def image_model_from_config(
    shapes: Shapes, *, name: str, dtype: torch.dtype, quantize: QuantSpec | None = None, gpu: bool = False
) -> ShapeImageModel:
    """Returns the frozen model of `shapes`, in eval mode; the linear layers of its denoiser are packed as `quantize` says.

    With `gpu`, the CPU represents the GPU, and idle parts are on the meta device.
    """
    package, kind = diffusers(), PIPELINES[shapes["_class_name"]]
    with quiet_diffusers():
        parts = nn.ModuleDict({kind.denoiser: _in(dtype, lambda: new_denoiser(shapes[kind.denoiser]))})
        for name_of_part in ENCODERS:
            if name_of_part in shapes:
                parts[name_of_part] = _in(dtype, partial(_encoder, shapes[name_of_part]))
        vae = _in(torch.float32, lambda: package.AutoencoderKL.from_config(dict(shapes["vae"])))
        steps = dict(shapes["scheduler"]) if kind.flow else with_defaults(shapes["scheduler"])
        if not kind.flow:
            check_betas(steps)
        scheduler = SimpleNamespace(config=steps) if kind.flow else package.DDPMScheduler.from_config(steps)
    denoiser = parts[kind.denoiser]
    put_packed(denoiser, packing_of_denoiser(denoiser, quantize or QuantSpec()), torch.device("cpu"))
    for part in (vae, parts):
        part.requires_grad_(False).eval()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pipeline = SimpleNamespace(scheduler=scheduler, vae=vae, vae_scale_factor=factor)
    return ShapeImageModel(name, kind, pipeline, parts, torch.device("cpu"), dtype, torch.device("meta") if gpu else None)


def _encoder(shape: Mapping[str, Any]) -> Any:
    """Returns the text encoder of a configuration; by default CLIP's without a projection."""
    settings, name = {key: value for key, value in shape.items() if not key.startswith("_")}, shape.get("_class_name", "")
    if name.startswith("T5"):
        return T5EncoderModel(T5Config(**settings))
    return _CLIP.get(name, CLIPTextModel)(CLIPTextConfig(**settings))


def _in(dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(usual)

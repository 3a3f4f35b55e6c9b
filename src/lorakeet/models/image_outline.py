"""An image model from its configurations alone: shapes without weights, for what is planned before anything is loaded.

Built inside a memory.ledger.Ledger its tensors take no memory; built outside they are real and random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorakeet.errors import ConfigError, nearest
from lorakeet.models.image import ENCODERS, PIPELINES, Conditioning, ImageModel, diffusers, new_denoiser, quiet_diffusers
from lorakeet.models.image_packed import packing_of_denoiser
from lorakeet.models.outline import put_packed
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec

Shapes = Mapping[str, Any]  # _class_name of the pipeline, and the configurations of its parts and of its scheduler, by name
_ENCODER_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@cache
def published_images() -> dict[str, Traversable]:
    """The configurations of well-known pipelines that ship with Lorakeet, by hub id."""
    entries = [entry for entry in (files("lorakeet.models") / "shapes" / "images").iterdir() if entry.name.endswith(".json")]
    return {entry.name.removesuffix(".json").replace("--", "/"): entry for entry in entries}


def shapes_of_images(spec: ModelSpec, say: Callable[[str], None]) -> Shapes:
    """The configurations of the pipeline that `spec.path` names; no weights are read or fetched.

    Those of a folder, a published shape (which needs no network), or those of a hub id. ConfigError where there are none.
    """
    name = spec.path
    found = {known.lower(): known for known in published_images()}.get(name.lower())
    if found is not None and not Path(name).expanduser().exists():
        return dict(json.loads(published_images()[found].read_text(encoding="utf-8")))
    package = diffusers()
    if not Path(name).expanduser().exists():
        say(f"Asking the model hub for the configurations of {name}.")
    try:
        with quiet_diffusers():
            index = package.DiffusionPipeline.load_config(name, revision=spec.revision)
            kind = PIPELINES.get(index.get("_class_name", ""))
            parts = {"unet": package.UNet2DConditionModel, "vae": package.AutoencoderKL, "scheduler": package.DDPMScheduler}
            shapes = {part: owner.load_config(name, subfolder=part, revision=spec.revision) for part, owner in parts.items()}
            encoders = ENCODERS if kind == "sdxl" else ENCODERS[:1]
            for part in encoders:
                config = CLIPTextConfig.from_pretrained(name, subfolder=part, revision=spec.revision or "main")
                shapes[part] = config.to_dict()
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        known = list(published_images())
        raise ConfigError(
            f"model.path '{name}' has no configurations that could be read: {first}. Name a folder that diffusers saved, a hub "
            f"id, or one of the shapes that need no network: {', '.join(known)}.{nearest(name, known)}"
        ) from error
    if kind is None:
        raise ConfigError(
            f"{name} is a {index.get('_class_name', 'pipeline without a name')}; expected {' or '.join(PIPELINES)}."
        )
    return {**shapes, "_class_name": index["_class_name"]}


@dataclass(frozen=True)
class OutlinedImage(ImageModel):
    """An ImageModel without tokenizers: captions are made-up ids, as many as the text encoders read."""

    def describe(self, captions: Sequence[str]) -> Conditioning:
        states: list[Tensor] = []
        pooled = None
        for name in ENCODERS:
            if name in self.parts:
                encoder: Any = self.parts[name]
                ids = torch.ones(len(captions), int(encoder.config.max_position_embeddings), dtype=torch.long, device=self.device)
                found = encoder(ids, output_hidden_states=self.kind == "sdxl")
                states.append(found.hidden_states[-2] if self.kind == "sdxl" else found[0])
                pooled = found[0] if self.kind == "sdxl" else None
        return Conditioning(torch.cat(states, dim=-1), pooled)


def outline_image(shapes: Shapes, *, name: str, dtype: torch.dtype, quantize: QuantSpec | None = None) -> OutlinedImage:
    """The frozen model of `shapes`, on the CPU, in eval mode; the linear layers of its UNet are packed as `quantize` asks."""
    package = diffusers()
    with quiet_diffusers():
        parts = nn.ModuleDict({"unet": _in(dtype, lambda: new_denoiser(shapes["unet"]))})
        for encoder in ENCODERS:
            if encoder in shapes:
                config = CLIPTextConfig(**{key: value for key, value in shapes[encoder].items() if not key.startswith("_")})
                parts[encoder] = _in(dtype, lambda owner=_ENCODER_CLASSES[encoder], config=config: owner(config))  # type: ignore[misc]
        vae = _in(torch.float32, lambda: package.AutoencoderKL.from_config(dict(shapes["vae"])))
        scheduler = package.DDPMScheduler.from_config(dict(shapes["scheduler"]))
    put_packed(parts["unet"], packing_of_denoiser(parts["unet"], quantize or QuantSpec()), torch.device("cpu"))
    for part in (vae, parts):
        part.requires_grad_(False).eval()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pipeline = SimpleNamespace(scheduler=scheduler, vae=vae, vae_scale_factor=factor)
    kind = PIPELINES[shapes["_class_name"]]
    return OutlinedImage(name, kind, pipeline, parts, torch.device("cpu"), dtype)


def _in(dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(usual)

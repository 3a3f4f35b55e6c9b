"""Adapters for conversion: mixed ranks and alphas, for a language model, Stable Diffusion 1.x, SDXL, and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import Kind
from tiny.adapters import random_adapter, random_pair
from tiny.models import tiny_model

_UNET = {
    "down_blocks.1.attentions.0.proj_in": ("conv2d", (16, 16, 1, 1)),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": ("linear", (16, 16)),
    "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0": ("linear", (16, 16)),
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": ("linear", (32, 16)),
    "down_blocks.1.resnets.0.conv1": ("conv2d", (16, 8, 3, 3)),
    "down_blocks.1.resnets.0.conv_shortcut": ("conv2d", (16, 8, 1, 1)),
}
_SD1 = {"up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k": ("linear", (16, 768))}
_SDXL = {
    "up_blocks.0.attentions.2.transformer_blocks.7.attn2.to_k": ("linear", (16, 2048)),
    "up_blocks.1.upsamplers.0.conv": ("conv2d", (16, 16, 3, 3)),
    "add_embedding.linear_1": ("linear", (16, 24)),
    "conv_in": ("conv2d", (8, 4, 3, 3)),
}
_CLIP = {
    "text_model.encoder.layers.0.self_attn.q_proj": ("linear", (16, 16)),
    "text_model.encoder.layers.11.mlp.fc1": ("linear", (24, 16)),
}

_TRANSFORMERS = {
    "flux": {
        "transformer_blocks.0.attn.to_q": (16, 16), "transformer_blocks.0.attn.to_k": (16, 16),
        "transformer_blocks.0.attn.to_v": (16, 16), "transformer_blocks.18.attn.add_k_proj": (16, 16),
        "transformer_blocks.18.ff_context.net.0.proj": (64, 16), "single_transformer_blocks.37.attn.to_q": (16, 16),
        "single_transformer_blocks.37.proj_mlp": (64, 16), "single_transformer_blocks.37.proj_out": (16, 80),
        "single_transformer_blocks.0.attn.to_v": (16, 16), "norm_out.linear": (32, 16), "x_embedder": (16, 8),
    },
    "sd3": {
        "transformer_blocks.0.attn.to_q": (16, 16), "transformer_blocks.0.attn.to_v": (16, 16),
        "transformer_blocks.2.attn2.to_q": (16, 16), "transformer_blocks.2.attn2.to_k": (16, 16),
        "transformer_blocks.2.attn2.to_v": (16, 16), "transformer_blocks.23.norm1_context.linear": (32, 16),
        "transformer_blocks.2.norm1.linear": (144, 16), "transformer_blocks.2.ff.net.2": (16, 64), "norm_out.linear": (32, 16),
    },
}  # fmt: skip


def image_adapter(*, sdxl: bool = False, clip: bool = True, dora: bool = False) -> Adapter:
    """Ranks 2 to 4, alphas 12 and 20, linear layers and convolutions."""
    torch.manual_seed(4)
    unet = {**_UNET, **(_SDXL if sdxl else _SD1)}
    modules: dict[str, tuple[str, tuple[int, ...]]] = {f"unet.{path}": what for path, what in unet.items()}
    if clip:
        modules |= {f"text_encoder.{path}": what for path, what in _CLIP.items()}
    if clip and sdxl:
        modules |= {f"text_encoder_2.{path}": what for path, what in _CLIP.items()}
    return Adapter(_pairs(modules, dora), metadata={"ss_output_name": "tiny", "ss_tag": "ä [1]"})


def transformer_adapter(family: str) -> Adapter:
    """The same of FLUX or SD3: whole and partial groups of queries, keys and values, modulations, and CLIP."""
    torch.manual_seed(5)
    found = {f"transformer.{path}": ("linear", shape) for path, shape in _TRANSFORMERS[family].items()}
    if family == "sd3":
        found["transformer.pos_embed.proj"] = ("conv2d", (16, 4, 2, 2))
    found |= {f"text_encoder.{path}": what for path, what in _CLIP.items()}
    return Adapter(_pairs(found, dora=False), metadata={"ss_output_name": "tiny"})


def _pairs(modules: dict[str, tuple[str, tuple[int, ...]]], dora: bool) -> dict[str, Pair]:
    return {
        path: random_pair(kind, torch.randn(shape), rank=(2, 4, 3)[index % 3], alpha=(12.0, 20.0)[index % 2], dora=dora)
        for index, (path, (kind, shape)) in enumerate(modules.items())
    }


def text_adapter(*, mixed: bool = True, **options: Any) -> Adapter:
    """Pairs on every linear layer of the tiny Llama; `mixed` gives them three ranks and two alphas, one of them rsLoRA's."""
    plain = random_adapter(tiny_model("llama"), **options)
    if not mixed:
        return plain
    torch.manual_seed(7)
    pairs = {}
    for index, (path, pair) in enumerate(plain.pairs.items()):
        kind: Kind = pair.kind
        rank = (2, 4, 3)[index % 3]
        A, B = torch.randn(rank, pair.A.shape[1]) * 0.1, torch.randn(pair.B.shape[0], rank) * 0.1
        rule = "alpha/sqrt(rank)" if index % 4 == 0 else "alpha/rank"
        pairs[path] = Pair(A, B, (12.0, 20.0)[index % 2], kind, rule, pair.magnitude)  # type: ignore[arg-type]
    return Adapter(pairs, base="tiny")


def llama_config(folder: Path) -> Path:
    """The config.json of the tiny Llama, alone."""
    path = folder / "llama.json"
    path.write_text(json.dumps(tiny_model("llama").config.to_dict(), default=str))
    return path

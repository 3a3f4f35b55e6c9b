"""FLUX and SD3 in the layout of their original checkpoints, made from diffusers' modules by our tables of names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.formats.diffusion.kohya_keys import TransformerFamily, originals
from tiny.images import diffusers

_NORMS = {
    "flux": {
        "transformer_blocks.{}.attn.norm_q": "double_blocks.{}.img_attn.norm.query_norm",
        "transformer_blocks.{}.attn.norm_k": "double_blocks.{}.img_attn.norm.key_norm",
        "transformer_blocks.{}.attn.norm_added_q": "double_blocks.{}.txt_attn.norm.query_norm",
        "transformer_blocks.{}.attn.norm_added_k": "double_blocks.{}.txt_attn.norm.key_norm",
        "single_transformer_blocks.{}.attn.norm_q": "single_blocks.{}.norm.query_norm",
        "single_transformer_blocks.{}.attn.norm_k": "single_blocks.{}.norm.key_norm",
    },
    "sd3": {
        "transformer_blocks.{}.attn.norm_q": "joint_blocks.{}.x_block.attn.ln_q",
        "transformer_blocks.{}.attn.norm_k": "joint_blocks.{}.x_block.attn.ln_k",
        "transformer_blocks.{}.attn.norm_added_q": "joint_blocks.{}.context_block.attn.ln_q",
        "transformer_blocks.{}.attn.norm_added_k": "joint_blocks.{}.context_block.attn.ln_k",
        "transformer_blocks.{}.attn2.norm_q": "joint_blocks.{}.x_block.attn2.ln_q",
        "transformer_blocks.{}.attn2.norm_k": "joint_blocks.{}.x_block.attn2.ln_k",
    },
}


def original_layout(state: dict[str, Tensor], family: TransformerFamily) -> dict[str, Tensor]:
    """The tensors of a transformer of diffusers' as the original checkpoint holds them: joined, and shift before scale."""
    found: dict[str, Tensor] = {}
    for theirs, parts in originals(family).items():
        for leaf in ("weight", "bias"):
            tensors = [state.get(f"{path.removeprefix('transformer.')}.{leaf}") for path in parts]
            there = [tensor for tensor in tensors if tensor is not None]
            if there:
                assert len(there) == len(tensors), theirs
                joined = torch.cat(there)
                two = theirs.endswith("adaLN_modulation.1") and len(joined) == 2 * len(state["context_embedder.bias"])
                found[f"{theirs}.{leaf}"] = joined.roll(len(joined) // 2, 0) if two else joined
    for ours, theirs in _NORMS[family].items():
        for number in range(40):
            if (tensor := state.get(f"{ours.format(number)}.weight")) is not None:
                found[f"{theirs.format(number)}.{'scale' if family == 'flux' else 'weight'}"] = tensor
    if "pos_embed.pos_embed" in state:
        found["pos_embed"] = state["pos_embed.pos_embed"]
    return found


def from_original(tensors: dict[str, Tensor], family: TransformerFamily) -> dict[str, Any]:
    """What diffusers' own converter of checkpoints makes of them."""
    diffusers()
    from diffusers.loaders import single_file_utils

    name = f"convert_{family}_transformer_checkpoint_to_diffusers"
    converted: dict[str, Any] = getattr(single_file_utils, name)(dict(tensors))
    return converted

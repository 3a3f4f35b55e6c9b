"""A tiny Stable Diffusion written into one file under the names of Stability's own code (LDM), as checkpoints are shared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
_UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip


def save_ldm(pipeline: Any, path: Path, *, metadata: dict[str, str] | None = None, **extra: torch.Tensor) -> Path:
    """The pipeline's weights in the file `path`, with the tensors `extra` beside them."""
    layers = pipeline.unet.config.layers_per_block
    found = {f"model.diffusion_model.{_unet_name(name, layers)}": value for name, value in pipeline.unet.state_dict().items()}
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, value in pipeline.vae.state_dict().items():
        spread = value[:, :, None, None] if re.search(r"attentions.*to_.*weight", name) else value
        found[f"first_stage_model.{_vae_name(name, blocks)}"] = spread
    xl = getattr(pipeline, "text_encoder_2", None) is not None
    prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    for name, value in pipeline.text_encoder.state_dict().items():
        found[f"{prefix}text_model.{name.removeprefix('text_model.')}"] = value
    if xl:
        found |= {f"conditioner.embedders.1.model.{name}": value for name, value in _open_clip(pipeline.text_encoder_2)}
    save_file({name: value.contiguous().clone() for name, value in (found | extra).items()}, path, metadata=metadata)
    return path


def _unet_name(name: str, layers: int) -> str:
    for ours, theirs in _UNET.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if match is None:
        part, place, rest = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        return f"middle_block.{1 if part == 'attentions' else 2 * int(place)}.{_resnet(rest) if part == 'resnets' else rest}"
    side, block, part, place, rest = match.groups()
    first = int(block) * (layers + 1)
    if side == "down":
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        head = f"input_blocks.{1 + first + int(place)}"
    elif part == "upsamplers":
        return f"output_blocks.{first + layers}.{1 if block == '0' else 2}.{rest}"
    else:
        head = f"output_blocks.{first + int(place)}"
    return f"{head}.0.{_resnet(rest)}" if part == "resnets" else f"{head}.1.{rest}"


def _resnet(rest: str) -> str:
    head, _, leaf = rest.rpartition(".")
    return f"{_RESNET[head]}.{leaf}"


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in _VAE_ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", name)


def _open_clip(encoder: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a CLIP text encoder in OpenCLIP's names, where q, k and v are one matrix."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    found = [
        ("positional_embedding", state.pop("embeddings.position_embedding.weight")),
        ("token_embedding.weight", state.pop("embeddings.token_embedding.weight")),
        ("ln_final.weight", state.pop("final_layer_norm.weight")),
        ("ln_final.bias", state.pop("final_layer_norm.bias")),
        ("text_projection", state.pop("text_projection.weight").T),
    ]
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        parts = torch.cat([state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"])
        leaf = name.rpartition(".")[2]
        found.append((f"transformer.resblocks.{name.split('.')[2]}.attn.in_proj_{leaf}", parts))
    for name, value in state.items():
        if name.startswith("encoder.layers."):
            theirs = name.removeprefix("encoder.layers.")
            for ours, other in _OPEN_CLIP.items():
                theirs = theirs.replace(ours, other)
            found.append((f"transformer.resblocks.{theirs}", value))
    return found

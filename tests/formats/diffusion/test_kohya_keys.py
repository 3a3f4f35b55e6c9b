"""The tables of names against the real classes: every module of SD 1.x, SDXL and CLIP, and nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError
from lorakeet.formats.diffusion import kohya_keys
from tiny.adapters import random_pair
from tiny.images import diffusers

CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sdxl": {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_the_tables_are_the_modules_of_the_real_unet(family: Any) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = diffusers().UNet2DConditionModel(**CONFIGS[family])
    real = {name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert kohya_keys.unet_modules(family) == real
    ldm = kohya_keys.ldm_names(family)
    assert ldm.keys() == real and len(set(ldm.values())) == len(real)
    assert len({kohya_keys.flat(name) for name in real}) == len(real) == len({kohya_keys.flat(name) for name in ldm.values()})


def test_clips_table_is_the_modules_of_the_real_encoder() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, num_hidden_layers=32, num_attention_heads=2))
    real = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    ours = {name.removeprefix("text_model.") for name in kohya_keys.clip_modules()}
    assert ours == {name.removeprefix("text_model.") for name in real}


def test_templates_expand_in_every_combination() -> None:
    assert kohya_keys.expand("a.{0..1}.{x,y.0}") == ["a.0.x", "a.0.y.0", "a.1.x", "a.1.y.0"]
    assert kohya_keys.expand("plain") == ["plain"]


def test_the_family_is_recognised_by_base_note_names_and_widths() -> None:
    shared = Adapter({"unet.mid_block.resnets.0.conv1": random_pair("conv2d", torch.ones(4, 4, 3, 3))}).pairs
    sdxl = {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}
    assert kohya_keys.diffusion_family(dict(shared), {}, sdxl) == "sdxl"
    assert kohya_keys.diffusion_family(dict(shared), {}, {"cross_attention_dim": 768}) == "sd1"
    assert kohya_keys.diffusion_family(dict(shared), {"ss_base_model_version": "sdxl_base_v1-0"}) == "sdxl"
    assert kohya_keys.diffusion_family(dict(shared), {"sd_family": "sd1"}) == "sd1"
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    for width, family in ((768, "sd1"), (2048, "sdxl")):
        assert kohya_keys.diffusion_family({key: random_pair("linear", torch.ones(4, width))}) == family
    with pytest.raises(ConfigError, match="Nothing says whether"):
        kohya_keys.diffusion_family(dict(shared))


def test_modules_whose_flat_keys_coincide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unet\.a\.b_c and unet\.a_b\.c are both lora_unet_a_b_c"):
        kohya_keys.flat_keys(["unet.a.b_c", "unet.a_b.c"])
    assert kohya_keys.flat_keys(["unet.my.block"])["lora_unet_my_block"] == "unet.my.block"

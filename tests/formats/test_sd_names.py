"""The tables of names against the real classes: every module of SD 1.x, SDXL and CLIP, and nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError
from lorakeet.formats import sd_names
from tiny.adapters import random_pair
from tiny.images import diffusers
from tiny.portable import image_adapter

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
    assert sd_names.unet_modules(family) == real
    ldm = sd_names.ldm_names(family)
    assert ldm.keys() == real and len(set(ldm.values())) == len(real)
    assert len({sd_names.flat(name) for name in real}) == len(real) == len({sd_names.flat(name) for name in ldm.values()})


def test_clips_table_is_the_modules_of_the_real_encoder() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, num_hidden_layers=32, num_attention_heads=2))
    real = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    ours = {name.removeprefix("text_model.") for name in sd_names.clip_modules()}
    assert ours == {name.removeprefix("text_model.") for name in real}


def test_templates_expand_in_every_combination() -> None:
    assert sd_names.expand("a.{0..1}.{x,y.0}") == ["a.0.x", "a.0.y.0", "a.1.x", "a.1.y.0"]
    assert sd_names.expand("plain") == ["plain"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.resnets.0.conv1"),
        ("text_model.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2.text_projection", "text_encoder_2.text_projection"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_paths_get_their_component(path: str, expected: str) -> None:
    assert sd_names.canonical(path) == expected and sd_names.canonical(expected) == expected


def test_a_unet_alone_loses_its_component_for_peft_and_gets_it_back() -> None:
    alone, both = image_adapter(clip=False), image_adapter()
    bare = sd_names.without_component(alone)
    assert not any(path.startswith("unet.") for path in bare.pairs)
    back = sd_names.with_components(bare)
    assert back.pairs.keys() == alone.pairs.keys() and back.metadata == alone.metadata
    assert sd_names.without_component(both) is both


def test_a_diffusion_transformer_alone_does_too_and_a_language_model_does_not() -> None:
    pair = random_pair("linear", torch.ones(4, 4))
    flow = Adapter({"transformer.transformer_blocks.0.attn.to_q": pair, "transformer.proj_out": pair})
    bare = sd_names.without_component(flow)
    assert list(bare.pairs) == ["transformer_blocks.0.attn.to_q", "proj_out"]
    assert sd_names.with_components(bare).pairs.keys() == flow.pairs.keys()
    assert sd_names.canonical("single_transformer_blocks.0.proj_mlp") == "transformer.single_transformer_blocks.0.proj_mlp"
    gpt2 = Adapter({"transformer.h.0.attn.c_attn": pair})
    assert [sd_names.of_image_model(one) for one in (flow, bare, gpt2)] == [True, True, False]
    assert sd_names.of_image_model(Adapter({"text_encoder.text_model.encoder.layers.0.mlp.fc1": pair}))
    assert sd_names.without_component(gpt2) is gpt2 and sd_names.with_components(gpt2).pairs.keys() == gpt2.pairs.keys()


def test_the_family_is_told_by_base_note_names_and_widths() -> None:
    shared = Adapter({"unet.mid_block.resnets.0.conv1": random_pair("conv2d", torch.ones(4, 4, 3, 3))}).pairs
    sdxl = {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}
    assert sd_names.diffusion_family(dict(shared), {}, sdxl) == "sdxl"
    assert sd_names.diffusion_family(dict(shared), {}, {"cross_attention_dim": 768}) == "sd1"
    assert sd_names.diffusion_family(dict(shared), {"ss_base_model_version": "sdxl_base_v1-0"}) == "sdxl"
    assert sd_names.diffusion_family(dict(shared), {"sd_family": "sd1"}) == "sd1"
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    for width, family in ((768, "sd1"), (2048, "sdxl")):
        assert sd_names.diffusion_family({key: random_pair("linear", torch.ones(4, width))}) == family
    with pytest.raises(ConfigError, match="Nothing says whether"):
        sd_names.diffusion_family(dict(shared))


def test_modules_whose_flat_keys_coincide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unet\.a\.b_c and unet\.a_b\.c are both lora_unet_a_b_c"):
        sd_names.flat_keys(["unet.a.b_c", "unet.a_b.c"])
    assert sd_names.flat_keys(["unet.my.block"])["lora_unet_my_block"] == "unet.my.block"

"""The tables of names against the real classes: every module of SD 1.x, SDXL and CLIP, and nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError
from lorakeet.formats.diffusion import kohya_keys
from lorakeet.formats.diffusion.kohya_keys import (
    TransformerFamily,
    of_keys,
    originals,
    transformer_family,
    transformer_keys,
    transformer_modules,
)
from tiny.adapters import random_pair
from tiny.images import diffusers
from tiny.originals import from_original, original_layout

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


def real(family: TransformerFamily, **changes: Any) -> nn.Module:
    """FLUX.1-dev's transformer, or one with all that any SD3 or 3.5 has, on the meta device."""
    sd3 = {"num_layers": 38, "num_attention_heads": 24, "caption_projection_dim": 24 * 64, "qk_norm": "rms_norm",
           "dual_attention_layers": tuple(range(38))}  # fmt: skip
    with torch.device("meta"):
        if family == "flux":
            model: nn.Module = diffusers().FluxTransformer2DModel(**{"guidance_embeds": True, **changes})
        else:
            model = diffusers().SD3Transformer2DModel(**{**sd3, **changes})
    return model


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_tables_are_the_modules_of_the_real_transformer(family: TransformerFamily) -> None:
    found = {name for name, module in real(family).named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    ours = {path.removeprefix("transformer.") for path in transformer_modules(family)}
    last = {"attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"} if family == "sd3" else set()
    assert found == ours - {f"transformer_blocks.37.{name}" for name in last}  # SD3's last block gives pictures alone


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_diffusers_converter_of_checkpoints_undoes_the_tables(family: TransformerFamily) -> None:
    """Names and joined shapes; every original matrix is used, and every one of diffusers' is made."""
    state = real(family).state_dict()
    converted = from_original(original_layout(state, family), family)
    assert {name: tensor.shape for name, tensor in converted.items()} == {name: tensor.shape for name, tensor in state.items()}


def test_keys_of_the_two_tell_them_apart() -> None:
    keys = transformer_keys()
    assert keys["lora_unet_single_blocks_37_linear1"][3] == "transformer.single_transformer_blocks.37.proj_mlp"
    assert keys["lora_transformer_transformer_blocks_0_attn_to_q"] == ("transformer.transformer_blocks.0.attn.to_q",)
    assert keys["lora_unet_final_layer_linear"] == ("transformer.proj_out",)
    assert of_keys(["lora_unet_double_blocks_0_img_mlp_0"]) == "flux"
    assert of_keys(["lora_unet_joint_blocks_0_x_block_mlp_fc1", "lora_unet_final_layer_linear"]) == "sd3"
    assert of_keys(["lora_transformer_transformer_blocks_0_attn_to_q", "lora_unet_final_layer_linear"]) is None
    assert len(originals("flux")) == 19 * 10 + 38 * 3 + 10


def pair(*shape: int) -> Pair:
    return random_pair("linear", torch.zeros(shape))


def test_the_family_is_recognised_by_base_note_names_or_width() -> None:
    q = "transformer.transformer_blocks.0.attn.to_q"
    narrow, flux, sd3 = ({q: pair(width, width)} for width in (16, 3072, 1536))
    assert transformer_family(narrow, {}, {"_class_name": "SD3Transformer2DModel"}) == "sd3"
    assert transformer_family(narrow, {"ss_base_model_version": "flux1"}, {}) == "flux"
    assert transformer_family(narrow, {"sd_family": "sd3"}, {}) == "sd3"
    assert transformer_family({**narrow, "transformer.single_transformer_blocks.3.proj_out": pair(16, 80)}, {}, {}) == "flux"
    assert transformer_family({"transformer.transformer_blocks.1.attn2.to_q": pair(16, 16)}, {}, {}) == "sd3"
    assert (transformer_family(flux, {}, {}), transformer_family(sd3, {}, {})) == ("flux", "sd3")
    with pytest.raises(ConfigError, match=r"Nothing says whether the 1 pairs .* FLUX or to SD3.* --base"):
        transformer_family(narrow, {}, {})
    with pytest.raises(ConfigError, match=r"neither to FLUX\.1's transformer nor to SD3's.*attn\.to_qq\. Did you mean .*to_q'"):
        transformer_family({f"{q}q": pair(16, 16)}, {}, {})

"""The tables of FLUX and SD3 against diffusers' classes and its converters of the original checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakeet.core.adapter import Pair
from lorakeet.errors import ConfigError
from lorakeet.formats.diffusion.transformer_names import (
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

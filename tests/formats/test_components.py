"""Which component of an image pipeline a path belongs to."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.formats import components
from tiny.adapters import random_pair
from tiny.portable import image_adapter


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
    assert components.canonical_path(path) == expected and components.canonical_path(expected) == expected


def test_a_unet_alone_loses_its_component_for_peft_and_gets_it_back() -> None:
    alone, both = image_adapter(clip=False), image_adapter()
    bare = components.without_component(alone)
    assert not any(path.startswith("unet.") for path in bare.pairs)
    back = components.with_components(bare)
    assert back.pairs.keys() == alone.pairs.keys() and back.metadata == alone.metadata
    assert components.without_component(both) is both


def test_a_diffusion_transformer_alone_does_too_and_a_language_model_does_not() -> None:
    pair = random_pair("linear", torch.ones(4, 4))
    flow = Adapter({"transformer.transformer_blocks.0.attn.to_q": pair, "transformer.proj_out": pair})
    bare = components.without_component(flow)
    assert list(bare.pairs) == ["transformer_blocks.0.attn.to_q", "proj_out"]
    assert components.with_components(bare).pairs.keys() == flow.pairs.keys()
    assert components.canonical_path("single_transformer_blocks.0.proj_mlp") == "transformer.single_transformer_blocks.0.proj_mlp"
    gpt2 = Adapter({"transformer.h.0.attn.c_attn": pair})
    assert [components.of_image_model(one) for one in (flow, bare, gpt2)] == [True, True, False]
    assert components.of_image_model(Adapter({"text_encoder.text_model.encoder.layers.0.mlp.fc1": pair}))
    assert components.without_component(gpt2) is gpt2 and components.with_components(gpt2).pairs.keys() == gpt2.pairs.keys()



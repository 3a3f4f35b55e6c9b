"""What kind of module each weight of a model belongs to, for the architectures that people train."""

from __future__ import annotations

from typing import Any

import pytest

from lorakeet.models.module_kinds import EXPERT, ROUTER, kind_in_words, stateful_parts
from lorakeet.models.modules import original_modules
from tiny.outlines import outline


def kinds(model: Any) -> dict[str, str]:
    """The kind of each module with parameters of its own, by its path without numbers."""
    by_path = dict(original_modules(model))
    return {
        ".".join("#" if part.isdigit() else part for part in path.split(".")): kind_in_words(model, by_path, path)
        for path, module in by_path.items()
        if path and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("qwen3_next", "model.layers.#.linear_attn.in_proj_qkvz", "DeltaNet"),
        ("qwen3_next", "model.layers.#.linear_attn.conv1d", "convolution"),
        ("qwen3_next", "model.layers.#.self_attn.q_proj", "attention"),
        ("mamba2", "backbone.layers.#.mixer.in_proj", "Mamba"),
        ("falcon_h1", "model.layers.#.mamba.in_proj", "Mamba"),
        ("jamba", "model.layers.#.mamba.x_proj", "Mamba"),
        ("granite_hybrid", "model.layers.#.block_sparse_moe.experts", EXPERT),
        ("nemotron_h", "model.layers.#.mixer.gate", ROUTER),
        ("lfm2", "model.layers.#.conv.in_proj", "convolution"),
        ("dbrx", "transformer.blocks.#.ffn.experts.mlp", EXPERT),
        ("dbrx", "transformer.blocks.#.ffn.router.layer", ROUTER),
        ("jetmoe", "model.layers.#.mlp.router.layer", ROUTER),
        ("gemma3", "model.vision_tower.encoder.layers.#.self_attn.q_proj", "vision tower"),
        ("gemma3", "model.language_model.layers.#.self_attn.q_proj", "attention"),
        ("gemma3", "model.multi_modal_projector", "projector"),
    ],
)
def test_each_kind_of_layer_has_its_word(name: str, path: str, kind: str) -> None:
    assert kinds(outline(name))[path] == kind


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen3_next", ["Qwen3NextGatedDeltaNet"]),
        ("mamba2", ["Mamba2Mixer"]),
        ("falcon_h1", ["FalconH1Mixer"]),
        ("lfm2", ["Lfm2ShortConv"]),
        ("nemotron_h", ["NemotronHMamba2Mixer"]),
        ("gemma3", []),  # the convolution of its vision tower is no part of the text
        ("dbrx", []),
    ],
)
def test_layers_with_a_state_from_token_to_token_are_named(name: str, parts: list[str]) -> None:
    assert stateful_parts(outline(name)) == parts

"""Which models the server cannot write texts of, and why: a table, read before any weight is.

What the table does not know is tried on the loaded model, before the server listens (models/generate/kv_cache).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.initialization import no_init_weights

from lorakeet.data.locate import locate_model
from lorakeet.errors import ConfigError, DataError
from lorakeet.models.families import CHOOSING
from lorakeet.models.files.foreign_code import build_native
from lorakeet.models.files.quantized import plain_config
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.source import find_source, on_this_machine
from lorakeet.models.files.validate import auto_class_of
from lorakeet.models.module_kinds import stateful_parts
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import config_of
from lorakeet.models.text.load import ReadBefore, read_config
from lorakeet.models.text.repeated_blocks import first_blocks_of_config
from lorakeet.models.text.row_masks import states_are_cached

BLOCKS = 8  # that are built of a model whose configuration does not list the kinds of its blocks
REMEDY = (
    "Merge its adapter (lorakeet merge) and serve the merged model with another server; with llama.cpp, where lorakeet export "
    "writes a GGUF file of it. Or try --engine vllm: each adapter is verified in vLLM before it is served."
)
# Models whose states are not in transformers' cache, that begin a state anew within a prompt, or whose layers compute earlier
# tokens again, for which they have no adapters. Of other models with states, the server keeps them for each text.
OWN_STATES = (
    "bailing_hybrid", "falcon_mamba", "jamba", "kimi_linear", "mamba", "mamba2", "minimax", "recurrent_gemma", "zaya",
)  # fmt: skip
_OWN_MASK = "its attention adds a mask of its own, and texts that share a batch have none"
_OWN_ATTENTION = "its attention cannot be exchanged for one over the texts of a batch"
_SEVERAL_PASSES = "its blocks run several times for a token, and the server keeps keys and values of one pass"
# Why, by model_type. Other layers with a state and indexers are found by their modules, of any type.
NOT_SERVED = {
    "diffllama": "its blocks attend twice, and the server keeps keys and values of one attention",
    **dict.fromkeys(("dory", "hrm_text"), _SEVERAL_PASSES),
    **dict.fromkeys(("nemotron", "stablelm"), "its code does not tell its attention where a text of the batch begins"),
    **dict.fromkeys(("doge", "git"), _OWN_MASK),
    "paligemma": "its attention sees the tokens after a token, and a text that is written has none",
    **dict.fromkeys(
        (
            "bloom", "falcon", "got_ocr2", "gpt_neo", "gpt_neox_japanese", "granite_speech", "granite_speech_plus", "mpt",
            "openai-gpt", "pp_chart2table", "xglm",
        ),
        _OWN_ATTENTION,
    ),
}


def why_not_served(model: nn.Module) -> str:
    """Why the server cannot write texts of this model, which may have no weights; empty where the table knows no reason."""
    kind = str(getattr(model.config, "model_type", ""))
    if (parts := stateful_parts(model)) and (kind in OWN_STATES or not states_are_cached(model.config)):
        carry = "carries" if len(parts) == 1 else "carry"
        named = f"its {' and '.join(parts)} {carry} a state from token to token"
        return f"{named} in a way of its own, which the server does not keep for each text"
    if any(path.rpartition(".")[2] in CHOOSING for path, _ in model.named_modules()):
        return "its indexer chooses by a mask which tokens are attended to, and texts that share a batch have no mask"
    return NOT_SERVED.get(kind, "")


def require_served(spec: ModelSpec, say: Callable[[str], None]) -> ReadBefore:
    """Raises ConfigError, with reason and remedy, for a model that the server cannot write texts of; reads no weights.

    Returns what was read of a folder, so that loading the model does not read it again. Of a hub id that is not on this machine
    only config.json is fetched, and of a .gguf file only the header is read. DataError where the configuration cannot be read.
    """
    path = locate_model(spec.path) or on_this_machine(spec)
    source = find_source(spec, say) if path is not None and path.is_dir() else None
    config: Any = config_of(spec, say) if source is None else read_config(source)
    if reason := why_not_served(few_blocks_of(config)):
        raise ConfigError(refusal_to_serve(spec.path, str(config.model_type), reason))
    return ReadBefore() if source is None else ReadBefore(source, config)


def few_blocks_of(config: Any) -> nn.Module:
    """The model of a transformers configuration on the meta device, without weights, with only the blocks that tell its kinds.

    They are the first ones, until each kind of `layer_types` was there, or BLOCKS. What a later block alone would tell is found
    on the loaded model. DataError where it cannot be built.
    """
    own = plain_config(config)
    text = own.get_text_config()
    count, kinds = getattr(text, "num_hidden_layers", None), getattr(text, "layer_types", None)
    enough = max(map(kinds.index, kinds)) + 1 if kinds else BLOCKS
    if not isinstance(count, int) or enough >= count:
        return _on_meta(own)
    try:
        return _on_meta(first_blocks_of_config(own, enough))
    except DataError:  # its other settings count on all blocks
        return _on_meta(own)


def _on_meta(config: Any) -> nn.Module:
    with quiet_transformers(), torch.device("meta"), no_init_weights():
        return cast(nn.Module, build_native(auto_class_of(config), config, attn_implementation="eager"))


def refusal_to_serve(name: str, kind: str, reason: str) -> str:
    """The message for a model of this name and model_type that cannot be served."""
    return f"{name} is a '{kind}' model, which cannot be served here: {reason}. {REMEDY}"

"""The components of an image pipeline: which part of it (UNet, transformer, text encoders) a module path belongs to.

Paths of image adapters begin with the component: `unet.down_blocks.…`, `text_encoder.text_model.…`,
`text_encoder_2.text_model.…`, `transformer.transformer_blocks.…`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from lorakeet.core.adapter import Adapter

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")
COMPONENT_KEY = "component"  # Adapter.metadata of a PEFT folder that belongs to one component of a pipeline
_ENCODERS = ("text_encoder", "text_encoder_2")
_UNET_PARTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_TRANSFORMER_PARTS = ("transformer_blocks", "single_transformer_blocks", "pos_embed", "x_embedder", "context_embedder",
                      "time_text_embed", "norm_out", "proj_out")  # fmt: skip
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_CLIP_PARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")


def component_of(path: str) -> str:
    """The component that `path` begins with; "" if the model is no image pipeline."""
    head = path.partition(".")[0]
    return head if head in COMPONENTS else ""


def canonical_path(path: str) -> str:
    """`path` with its component, and with CLIP's `text_model`, which transformers 5 omits and files on disk have."""
    component = component_of(path)
    rest = path[len(component) + 1 :] if component else path
    if not component:
        if rest.partition(".")[0] in _UNET_PARTS:
            return f"unet.{rest}"
        if rest.startswith(_BLOCKS):
            return f"transformer.{rest}"
        if rest.startswith("text_model.encoder."):
            return f"text_encoder.{rest}"
    if component in _ENCODERS and rest.startswith(_CLIP_PARTS):
        return f"{component}.text_model.{rest}"
    return path


def with_components(adapter: Adapter) -> Adapter:
    """An adapter of an image model with its component before every path; any other as it is."""
    component = adapter.metadata.get(COMPONENT_KEY, "")

    def full(path: str) -> str:
        return canonical_path(f"{component}.{path}" if component and not component_of(path) else path)

    metadata = {key: value for key, value in adapter.metadata.items() if key != COMPONENT_KEY}
    return dataclasses.replace(
        adapter,
        pairs={full(path): pair for path, pair in adapter.pairs.items()},
        extras={full(path): tensor for path, tensor in adapter.extras.items()},
        metadata=metadata,
    )


def of_image_model(adapter: Adapter) -> bool:
    """True if the adapter belongs to an image model, by its metadata or by its paths."""
    paths = [*adapter.pairs, *adapter.extras]
    return COMPONENT_KEY in adapter.metadata or any(
        in_transformer(path) or component_of(path) not in ("", "transformer") for path in paths
    )


def in_transformer(path: str) -> bool:
    """True if `path` is in the transformer of SD3 or FLUX; paths of some language models begin with `transformer` too."""
    return component_of(path) == "transformer" and path.split(".")[1] in _TRANSFORMER_PARTS


def without_component(adapter: Adapter) -> Adapter:
    """An adapter of only a UNet or only a diffusion transformer, without the component in its paths, as PEFT needs them.

    Any other as it is.
    """
    paths = [*adapter.pairs, *adapter.extras]
    components = {component_of(path) for path in paths}
    if components != {"unet"} and not (paths and all(in_transformer(path) for path in paths)):
        return adapter
    [component] = components
    return dataclasses.replace(
        adapter,
        pairs={path.partition(".")[2]: pair for path, pair in adapter.pairs.items()},
        extras={path.partition(".")[2]: tensor for path, tensor in adapter.extras.items()},
        metadata={**adapter.metadata, COMPONENT_KEY: component},
    )


@functools.cache
def table(name: str) -> Any:
    """The parsed table names/`name`.json."""
    return json.loads((resources.files("lorakeet.formats") / "names" / f"{name}.json").read_text(encoding="utf-8"))

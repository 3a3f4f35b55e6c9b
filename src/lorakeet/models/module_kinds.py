"""What kind of module a weight belongs to, in a word for people: a table of names and classes.

A new kind is one line in `MODULE_KINDS`. What the table does not know is called by its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lorakeet.models import modules
from lorakeet.models.families import OUTSIDE_TEXT

EXPERT, SHARED, ROUTER, HEAD, VECTORS = "experts", "shared experts", "router", "head", "norms, biases, other vectors"


@dataclass(frozen=True)
class ModuleKind:
    """A kind with the parts of class names, and the whole names of modules, by which it is recognised."""

    name: str
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


# Parts of a model beside the one that is trained: whatever is in them is called after them.
PARTS = (
    ModuleKind(
        "vision tower",
        names=("visual", "vision_tower", "vision_model", "vision_encoder", "vision_embedder", "vision_embed_tokens"),
    ),
    ModuleKind("audio tower", names=("audio_tower", "audio_model", "audio_encoder", "speech_encoder")),
    ModuleKind(
        "projector", ("Projector",),
        ("multi_modal_projector", "mm_projector", "connector", "aligner", "embed_vision", "embed_audio"),
    ),
    ModuleKind("text encoder", names=("text_encoder", "text_encoder_2", "text_encoder_3")),
)
# Of each module on the way outwards from a weight, the first kind that fits its class, or else its name, decides.
MODULE_KINDS = (
    ModuleKind("convolution", ("ShortConv",), ("conv",)),
    ModuleKind("DeltaNet", ("DeltaNet", "DeltaAttention")),
    ModuleKind("Mamba", ("MambaMixer", "Mamba2Mixer", "MambaLayer", "BambaMixer", "FalconH1Mixer"), ("mamba",)),
    ModuleKind(ROUTER, ("Router", "MoEV1Gate", "TopKGating"), ("router",)),
    ModuleKind(SHARED, ("SharedExpert", "SharedMLP"), ("shared_expert", "shared_experts", "shared_mlp")),
    ModuleKind(EXPERT, ("Experts", "ExpertGLU"), ("experts",)),
    ModuleKind("attention", ("Attention", "Attn"), ("self_attn", "attn", "attention", "self_attention", "cross_attn")),
    ModuleKind("MLP", ("MLP", "Mlp"), ("mlp",)),
    ModuleKind("feed-forward", ("FeedForward", "FFN"), ("feed_forward", "ffn", "ff", "ff_context", "proj_mlp")),
)
# Layers that carry a state from token to token without a convolution, by their class; others have one over the last tokens.
STATEFUL = ("LightningAttention", "LinearAttention", "RwkvSelfAttention", "RwkvFeedForward", "xLSTMLayer")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kind_in_words(model: nn.Module, by_path: Mapping[str, nn.Module], path: str) -> str:
    """The kind of the module at `path`, such as "attention"; `by_path` are all modules of `model` without adapters."""
    names = path.split(".")
    outwards = [".".join(names[:count]) for count in range(len(names), 0, -1)]
    for part in PARTS:
        if any(_fits(part, by_path[outer], outer) for outer in outwards):
            return part.name
    module = by_path[path]
    if modules.is_head(model, path, module):
        return HEAD
    if modules.is_router(model, path):
        return ROUTER
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    for outer in outwards:
        for kind in MODULE_KINDS:
            if _fits(kind, by_path[outer], outer):
                return kind.name
    return _own_class(model, by_path, outwards)


def stateful_parts(model: nn.Module) -> list[str]:
    """The classes of the layers of a text model that carry a state from token to token beside keys and values, in model order."""
    outside = set(OUTSIDE_TEXT.get(str(getattr(getattr(model, "config", None), "model_type", "")), ()))
    found = (
        type(module).__name__
        for path, module in modules.original_modules(modules.unwrapped(modules.decoder_of(model)))
        if not outside & set(path.split("."))
        and (any(type(child) is nn.Conv1d for child in module.children()) or type(module).__name__.endswith(STATEFUL))
    )
    return list(dict.fromkeys(found))


def _fits(kind: ModuleKind, module: nn.Module, path: str) -> bool:
    of_class = any(part in type(module).__name__ for part in kind.classes)
    return of_class or path.rpartition(".")[2] in kind.names


def _own_class(model: nn.Module, by_path: Mapping[str, nn.Module], outwards: list[str]) -> str:
    """The class of the innermost module that is no plain layer of torch, transformers' Conv1D or a packed layer."""
    for outer in outwards:
        module = by_path[outer]
        if modules.kind_of(module) is None and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            return type(module).__name__
    return type(model).__name__

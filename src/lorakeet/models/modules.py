"""How a model's module tree is read: paths as they were before adapters, which modules can carry a pair, where the blocks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.layers.linear import AdaptedLayer, Replacement
from lorakeet.core.math import Kind
from lorakeet.core.reordered import ReorderedLinear
from lorakeet.models.families import Family
from lorakeet.quant.packed import PackedBase, PackedLinear

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
HEADS = ("lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs", "value_head", "v_head")


def original_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) in model order, each adapted module as the one that it stands for."""
    module = unwrapped(model)
    yield prefix, module
    for name, child in module.named_children():
        yield from original_modules(child, f"{prefix}.{name}" if prefix else name)


def adapted_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, AdaptedLayer]]:
    """(path, layer) of every adapted module, in model order."""
    if isinstance(model, AdaptedLayer):
        yield prefix, model
    for name, child in unwrapped(model).named_children():
        yield from adapted_layers(child, f"{prefix}.{name}" if prefix else name)


def find(model: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` as it stands in the model (adapted or not), looking through adapted ones; None where none is."""
    here: nn.Module | None = model
    for name in path.split(".") if path else ():
        inside = unwrapped(here) if here is not None else None
        here = dict(inside.named_children()).get(name) if inside is not None else None
    return here


@contextmanager
def weights_loaded(model: nn.Module, path: str) -> Iterator[None]:
    """A context in which the weights of the module at `path` have numbers, also where they lie in a store until needed."""
    names = path.split(".")
    with ExitStack() as stack:
        for count in range(len(names) + 1):
            standing = find(model, ".".join(names[:count]))
            if isinstance(standing, Replacement):
                stack.enter_context(standing.weights_loaded())
        yield


def unwrapped(module: nn.Module) -> nn.Module:
    """The frozen module itself, where others stand in for it."""
    while isinstance(module, Replacement):
        module = module.original
    return module


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`."""
    parent_path, _, name = path.rpartition(".")
    parent = find(model, parent_path)
    setattr(unwrapped(cast(nn.Module, parent)), name, module)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of pair that fits `module`, or None; experts are parameters, see `expert_stacks`."""
    if isinstance(module, PackedLinear):
        return "conv1d" if module.transposed else "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, ReorderedLinear):
        return "linear"
    # A class with a forward of its own, or whose weight others read past forward (nn.MultiheadAttention), would ignore the pair.
    if type(module).forward is nn.Linear.forward and type(module).__name__ != "NonDynamicallyQuantizableLinear":
        return "linear"
    if isinstance(module, nn.Embedding):
        known = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if known and module.max_norm is None else None
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        return "conv2d"
    return None


def weight_shape(module: nn.Module, kind: Kind) -> tuple[int, ...]:
    """The weight's shape with output rows first, as `PlanEntry.shape` has it."""
    if isinstance(module, (PackedLinear, ReorderedLinear)):
        return module.base.shape
    shape = tuple(cast(Any, module).weight.shape)
    return shape[::-1] if kind == "conv1d" else shape


def frozen_rows(module: nn.Module, kind: Kind, leaf: str = "weight") -> tuple[Callable[[], Tensor], torch.device]:
    """What gives the frozen weight with output rows first, and its device; a packed weight is unpacked at each call only."""
    if isinstance(module, PackedLinear):
        return module.base.dense, module.base.device
    if isinstance(module, ReorderedLinear):
        return module.base.dense, torch.device("cpu")
    weight = module.get_parameter(leaf).detach()
    return (lambda: weight.t() if kind == "conv1d" else weight), weight.device


def is_packed(module: nn.Module) -> bool:
    """Whether a weight of `module`, or of one within it, is kept packed."""
    return any(isinstance(held, PackedBase) for held in module.modules())


def expert_stacks(module: nn.Module) -> list[str]:
    """Names of the 3-D parameters in which `module` keeps several experts, adaptable or not."""
    own = dict(module.named_parameters(recurse=False))
    return [name for name in EXPERT_PARAMETERS if name in own and own[name].dim() == 3]


def why_no_pair(module: nn.Module) -> str:
    """In words, why no pair can be put on `module`."""
    name = type(module).__name__
    if isinstance(module, nn.Conv2d):
        settings = f"groups={module.groups} and padding_mode={module.padding_mode!r}"
        return f"a {name} with {settings}; only groups=1 with zeros is adapted"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"a {name} with max_norm, which rewrites its rows as it runs"
    children = [child for child, _ in module.named_children()]
    if children:
        return f"a {name}, which holds {', '.join(children[:8])}; name these instead"
    return f"a {name}; pairs fit linear, GPT-2 Conv1D, Conv2d and embedding modules (lora.extra_modules trains others whole)"


def is_head(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether `module` is the output layer over the vocabulary or a classification head."""
    return path.rpartition(".")[2] in HEADS or module is output_layer(model)


def is_router(model: nn.Module, path: str) -> bool:
    """Whether the module at `path` chooses experts: a gate beside them."""
    parent_path, _, name = path.rpartition(".")
    parent = find(model, parent_path)
    names = {child for child, _ in parent.named_children()} if parent is not None else set()
    return bool(names & {"experts", "shared_expert", "shared_experts"}) and ("gate" in name or "router" in name)


def output_layer(model: nn.Module) -> nn.Module | None:
    """The frozen layer that turns hidden states into logits over the vocabulary, or None."""
    ask = getattr(model, "get_output_embeddings", None)
    layer = ask() if ask is not None else None
    return unwrapped(layer) if isinstance(layer, nn.Module) else None


def input_layer(model: nn.Module) -> nn.Module | None:
    """The frozen embedding of the input tokens, or None."""
    ask = getattr(model, "get_input_embeddings", None)
    layer = ask() if ask is not None else None
    return unwrapped(layer) if isinstance(layer, nn.Module) else None


def path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """The path of a module of the model, or an empty string."""
    return next((path for path, module in original_modules(model) if module is wanted), "")


def block_of(path: str, prefix: str) -> str:
    """The path of the block of the list `prefix` that `path` is in, where it is in one."""
    return ".".join(path.split(".")[: prefix.count(".") + 2])


def block_prefix(model: nn.Module, family: Family) -> tuple[str, int]:
    """Path and length of the list of blocks: the family's, else the longest list not inside another; ("", 0) without one."""
    lists = {path: module for path, module in original_modules(model) if isinstance(module, nn.ModuleList) and len(module)}
    if family.blocks in lists:
        return family.blocks, len(lists[family.blocks])
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    longest = max(outer, key=lambda path: len(lists[path]), default="")
    return longest, len(lists[longest]) if longest else 0

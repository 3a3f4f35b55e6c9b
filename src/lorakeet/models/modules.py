"""Reads a model's module tree: paths without adapters, which modules can have a pair, and the list of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.layers.experts import stored_transposed
from lorakeet.core.layers.linear import AdaptedLayer, Replacement
from lorakeet.core.math import Kind
from lorakeet.core.reordered import ReorderedLinear
from lorakeet.models.families import OUTSIDE_TEXT, Family
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.stack import PackedStack

EXPERTS = {"experts", "shared_expert", "shared_experts"}  # one of them stands beside a router
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
LINEAR_ALIKE = ("FalconLinear",)  # which have a forward of their own that computes the same
HEADS = ("lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs", "value_head", "v_head")

RANDOM = ("drop", "jitter", "noise")  # in the names of settings with which a model draws random numbers


def original_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) in model order, with the original of every wrapped module."""
    module = unwrapped(model)
    yield prefix, module
    for name, child in module.named_children():
        yield from original_modules(child, f"{prefix}.{name}" if prefix else name)


def adapted_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, AdaptedLayer]]:
    """Yields (path, layer) of every adapted module, in model order."""
    if isinstance(model, AdaptedLayer):
        yield prefix, model
    for name, child in unwrapped(model).named_children():
        yield from adapted_layers(child, f"{prefix}.{name}" if prefix else name)


def find(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at `path` as it is in the model (wrapped or not); None if there is none."""
    here: nn.Module | None = model
    for name in path.split(".") if path else ():
        inside = unwrapped(here) if here is not None else None
        here = inside._modules.get(name) if inside is not None else None
    return here


@contextmanager
def weights_loaded(model: nn.Module, path: str) -> Iterator[None]:
    """A context in which the weights of the module at `path` are in memory, also those of a streamed model."""
    names = path.split(".")
    with ExitStack() as stack:
        for count in range(len(names) + 1):
            current = find(model, ".".join(names[:count]))
            if isinstance(current, Replacement):
                stack.enter_context(current.weights_loaded())
        yield


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the frozen module inside all wrappers."""
    while isinstance(module, Replacement):
        module = module.original
    return module


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the module at `path` by `module`."""
    parent_path, _, name = path.rpartition(".")
    parent = find(model, parent_path)
    setattr(unwrapped(cast(nn.Module, parent)), name, module)


def kind_of(module: nn.Module) -> Kind | None:
    """Returns the kind of pair that fits `module`, or None; experts are parameters, see `expert_stacks`."""
    if isinstance(module, PackedLinear):
        return "conv1d" if module.transposed else "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, ReorderedLinear):
        return "linear"
    if type(module).__name__ in LINEAR_ALIKE:
        return "linear"
    # A class with its own forward, or whose weight is read without forward (nn.MultiheadAttention), would ignore the pair.
    if type(module).forward is nn.Linear.forward and type(module).__name__ != "NonDynamicallyQuantizableLinear":
        return "linear"
    if isinstance(module, nn.Embedding):
        known = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if known and module.max_norm is None else None
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        return "conv2d"
    return None


def weight_shape(module: nn.Module, kind: Kind) -> tuple[int, ...]:
    """Returns the weight's shape with output rows first, as in `PlanEntry.shape`."""
    if isinstance(module, (PackedLinear, ReorderedLinear)):
        return module.base.shape
    shape = tuple(cast(Any, module).weight.shape)
    return shape[::-1] if kind == "conv1d" else shape


def frozen_rows(module: nn.Module, kind: Kind, leaf: str = "weight") -> tuple[Callable[[], Tensor], torch.device]:
    """Returns a function for the frozen weight with output rows first, and its device; each call unpacks a packed weight."""
    if isinstance(module, PackedLinear):
        return module.base.dense, module.base.device
    if isinstance(module, ReorderedLinear):
        return module.base.dense, torch.device("cpu")
    stacked = module._modules.get(leaf)
    if isinstance(stacked, PackedStack):
        return stacked.dense, stacked.device
    weight = module.get_parameter(leaf).detach()
    if kind == "experts" and stored_transposed(module):
        return (lambda: weight.transpose(1, 2)), weight.device
    return (lambda: weight.t() if kind == "conv1d" else weight), weight.device


def probe_sizes(product: Callable[[Tensor], Tensor], x: Tensor) -> list[float]:
    """Factors for the input `x` of a probe: 1, and those with which the largest number of `product` is 10 and 100.

    Real activations are that large, and a clamp or a cap shows on large numbers only. In fp16 at most 10.
    """
    with torch.no_grad():
        largest = max(float(product(x).detach().abs().max()), torch.finfo(torch.float32).tiny)
    return [1.0, *(size / largest for size in ((10, 100) if x.dtype != torch.float16 else (10,)))]


def is_packed(module: nn.Module) -> bool:
    """True if `module` or a module in it has a packed weight."""
    return any(isinstance(each, (PackedBase, PackedStack)) for each in module.modules())


def expert_stacks(module: nn.Module) -> list[str]:
    """Returns the names of the 3-D parameters of `module` that stack experts, adaptable or not, packed or not."""
    own = dict(module.named_parameters(recurse=False))
    packed = [name for name, child in module._modules.items() if isinstance(child, PackedStack)]
    return [name for name in EXPERT_PARAMETERS if name in packed or (name in own and own[name].dim() == 3)]


def put_stack(model: nn.Module, path: str, stack: PackedStack) -> None:
    """Replaces the 3-D parameter at `path` by packed matrices, and lets transformers compute its experts one by one."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    stack.stand_for(module.get_parameter(name), transposed=stored_transposed(module))
    delattr(module, name)
    module.add_module(name, stack)
    if hasattr(module, "is_concatenated"):  # one of those for which transformers has several implementations
        cast(Any, module).config._experts_implementation = "eager"


def why_no_pair(module: nn.Module) -> str:
    """Returns the reason why `module` cannot have a pair."""
    name = type(module).__name__
    if isinstance(module, nn.Conv2d):
        settings = f"groups={module.groups} and padding_mode={module.padding_mode!r}"
        return f"a {name} with {settings}; only groups=1 with zeros is adapted"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"a {name} with max_norm, which rewrites its rows as it runs"
    children = [child for child, _ in module.named_children()]
    if children:
        return f"a {name}, which contains {', '.join(children[:8])}; name these instead"
    return f"a {name}; pairs fit linear, GPT-2 Conv1D, Conv2d and embedding modules (lora.extra_modules trains others whole)"


def is_head(model: nn.Module, path: str, module: nn.Module) -> bool:
    """True if `module` is the output layer over the vocabulary or a classification head."""
    return path.rpartition(".")[2] in HEADS or module is output_layer(model)


def is_router(model: nn.Module, path: str) -> bool:
    """True if the module at `path` is the router of a mixture of experts, or a part of one."""
    parts = path.split(".")
    for count in range(len(parts) - 1, -1, -1):
        name = parts[count]
        if name != "gate" and "router" not in name and not (name.startswith("shared_expert") and name.endswith("gate")):
            continue
        parent = find(model, ".".join(parts[:count]))
        beside = set(unwrapped(parent)._modules) if parent is not None else set()
        if beside & EXPERTS:
            return True
    return False


def draws_numbers(model: nn.Module) -> bool:
    """True if a pass in training mode may draw random numbers: by its settings, or since a module drops some."""
    return set_to_draw(model) or drops_numbers(model)


def set_to_draw(model: nn.Module) -> bool:
    """True if the configuration of `model` names a chance of dropping or a router's noise; or if its code is not that of
    transformers, and may do anything.
    """
    settings: dict[Any, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    chances = [value for part in parts for name, value in part.items() if any(word in str(name) for word in RANDOM)]
    known = type(model).__module__.partition(".")[0] == "transformers"
    return not known or any(isinstance(value, int | float) and value > 0 for value in chances)


def drops_numbers(module: nn.Module) -> bool:
    """True if a module in `module` has a chance of dropping."""
    chances = (getattr(part, name, 0) for part in module.modules() for name in ("dropout", "p"))
    return any(isinstance(value, int | float) and value > 0 for value in chances)


def output_layer(model: nn.Module) -> nn.Module | None:
    """Returns the frozen output layer over the vocabulary, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    layer = None if getter is None else getter()
    return unwrapped(layer) if isinstance(layer, nn.Module) else None


def input_layer(model: nn.Module) -> nn.Module | None:
    """Returns the frozen embedding of the input tokens, or None."""
    getter = getattr(model, "get_input_embeddings", None)
    layer = None if getter is None else getter()
    return unwrapped(layer) if isinstance(layer, nn.Module) else None


def path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """Returns the path of a module of the model, or an empty string."""
    return next((path for path, module in original_modules(model) if module is wanted), "")


def block_of(path: str, prefix: str) -> str:
    """Returns the path of the block in the list `prefix` that contains `path`, if one does."""
    return ".".join(path.split(".")[: prefix.count(".") + 2])


def blocks_run_once(model: nn.Module, family: Family) -> bool:
    """True if the list of blocks is all that the decoder runs, each once and in order: as many as the configuration counts.

    False for models that run their blocks several times, or have two lists of such blocks (HRM)."""
    prefix, count = block_prefix(model, family)
    if not count or getattr(cast(Any, model).config.get_text_config(), "num_hidden_layers", None) != count:
        return False
    lists = _lists_of_decoder(model)
    kind = type(unwrapped(lists[prefix][0])) if prefix in lists else None
    return not any(path != prefix and type(unwrapped(other[0])) is kind for path, other in lists.items())


def block_prefix(model: nn.Module, family: Family) -> tuple[str, int]:
    """Returns path and length of the list of blocks: the family's, else the longest of the decoder; ("", 0) without one."""
    named = find(model, family.blocks) if family.blocks else None
    if isinstance(named, nn.ModuleList) and len(named):
        return family.blocks, len(named)
    lists = _lists_of_decoder(model)
    longest = max(lists, key=lambda path: len(lists[path]), default="")
    return longest, len(lists[longest]) if longest else 0


def decoder_of(model: nn.Module) -> Any:
    """The part of a causal language model that makes hidden states of tokens; transformers knows it, but not for Llama 4.

    ModernBERT calls its head so.
    """
    found = cast(Any, model).get_decoder()
    return getattr(model, "model", found) if found in (model, output_layer(model)) else found


def text_part(model: nn.Module) -> str:
    """The path of the language model in a wrapper that also sees or hears; an empty string where the model is nothing else."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config or not hasattr(model, "get_decoder"):
        return ""
    return path_of(model, unwrapped(decoder_of(model)))


def outside_text(model: nn.Module) -> list[str]:
    """The parts of a wrapper that texts do not pass, such as a vision tower, by their outermost path, in model order.

    Embedding and head belong to the text.
    """
    text, kind = text_part(model), getattr(getattr(model, "config", None), "model_type", "")
    others, own = OUTSIDE_TEXT.get(kind, ()), {input_layer(model), output_layer(model)}
    found: list[str] = []
    for path, module in original_modules(model):
        if not path or any(path.startswith(f"{outer}.") for outer in found) or next(module.parameters(), None) is None:
            continue
        beside = bool(text) and f"{text}." != f"{path}."[: len(text) + 1] and not text.startswith(f"{path}.") and path != text
        if (beside and module not in own and not own & set(module.modules())) or path.rpartition(".")[2] in others:
            found.append(path)
    return found


def _lists_of_decoder(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules by path. A wrapper's other parts, such as a vision tower, have lists that do not count."""
    decoder = path_of(model, unwrapped(decoder_of(model))) if hasattr(model, "get_decoder") else ""
    others = set(OUTSIDE_TEXT.get(str(getattr(getattr(model, "config", None), "model_type", "")), ()))
    found: dict[str, nn.ModuleList] = {}
    for path, module in original_modules(model):
        inside = (not decoder or path.startswith(f"{decoder}.")) and not others & set(path.split("."))
        if inside and isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{p}.") for p in found):
            found[path] = module
    return found

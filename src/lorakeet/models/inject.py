"""Injects pairs into a model as a Plan says, ejects them, and converts adapters between model and value.

Modules are replaced by adapted ones that wrap them; no class is edited. A model can have several adapters by name, at most one
of them active. Weights are never written: a pair on a tied embedding changes the embedding, not the head, since both keep
sharing the frozen original (and the other way round for a pair on the head).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.core.dora import DoraPair
from lorakeet.core.layers.experts import (
    ExpertPairs,
    LoraExperts,
    first_stack,
    input_width,
    placed_as,
    stack_of,
    stack_shape,
    unsaid_transposed,
)
from lorakeet.core.layers.extras import TokenRowsEmbedding, TokenRowsHead, TokenRowsLayer, TrainedModule, TrainedRows
from lorakeet.core.layers.linear import AdaptedLayer, LoraConv2d, LoraEmbedding, LoraLinear, new_pair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import ExtraEntry, Plan, PlanEntry
from lorakeet.core.selection import Selection
from lorakeet.errors import ConfigError, Problems, nearest
from lorakeet.formats.peft.renamed_targets import model_type_to_keep
from lorakeet.models import modules
from lorakeet.models.fits import plan_of
from lorakeet.models.fuse import unfuse
from lorakeet.quant.construct import base_of
from lorakeet.quant.packed import PackedLinear


def inject(
    model: nn.Module,
    plan: Plan,
    name: str = "default",
    *,
    seed: int = 0,
    token_ids: tuple[int, ...] | None = None,
    on_pair: Callable[[nn.Module], None] | None = None,
) -> None:
    """Adds an adapter `name` as `plan` says, initialised from `seed`, makes it active and freezes everything else.

    `token_ids` are the tokenizer's ids of the plan's new tokens; by default the rows after the last one. `on_pair` is called
    with each pair once it is initialised. Raises ConfigError if the plan is of another model or the name is taken.
    """
    _check_name(model, name)
    _check_paths(model, plan)
    _freeze(model)
    for entry in plan.entries:
        with modules.weights_loaded(model, entry.path):
            weight, device = _frozen_rows(model, entry)
            pair = new_pair(entry, weight=weight, seed=seed, device=device)
            if on_pair is not None:
                on_pair(pair)
            _put_pair(model, entry, name, pair)
    for extra in plan.extras:
        with modules.weights_loaded(model, extra.path):
            _put_extra(model, extra, name, token_ids)
    activate(model, name)


def eject(model: nn.Module, name: str | None = None) -> None:
    """Removes the adapter `name` (None: all); without adapters the model has its own modules, bit for bit."""
    if name is not None and not has_adapter(model, name):
        raise ConfigError(_unknown(model, name))
    layers = list(modules.adapted_layers(model))
    for _, layer in layers:
        for each in [name] if name is not None else list(layer.adapters):
            if each in layer.adapters:
                layer.detach(each)
    if not any(isinstance(layer, TokenRowsLayer) and len(layer.adapters) for _, layer in layers):
        shrink(model)
    for path, layer in layers:
        if not len(layer.adapters):
            modules.replace(model, path, layer.original)
    if not adapter_names(model):
        unfuse(model)


def activate(model: nn.Module, name: str | None) -> None:
    """Activates the adapter `name`, or none: then every original module runs, bit for bit.

    The cost does not depend on the number of adapters on the model.
    """
    if name is not None and not has_adapter(model, name):
        raise ConfigError(_unknown(model, name))
    selection_of(model).use(name)


def selection_of(model: nn.Module) -> Selection:
    """Returns the Selection of all adapted layers of the model: `use` switches it, `divide` assigns adapters to tokens."""
    layers = [layer for _, layer in modules.adapted_layers(model)]
    shared = layers[0].selection if layers else Selection()
    for layer in layers:
        layer.selection = shared
    return shared


def use_products(model: nn.Module, products: torch.dtype) -> None:
    """Sets the dtype of the products of every adapted and packed layer (core/precision)."""
    for _, layer in modules.adapted_layers(model):
        layer.products = products
    for _, module in modules.original_modules(model):
        if isinstance(module, PackedLinear):
            module.products = products


def attach(model: nn.Module, adapter: Adapter, name: str = "default") -> None:
    """Adds a finished adapter under `name` and makes it active.

    Raises ConfigError "The adapter does not fit this base" that lists every missing module and wrong shape.
    """
    _check_name(model, name)
    plan = plan_of(model, adapter)
    _freeze(model)
    for entry in plan.entries:
        with modules.weights_loaded(model, entry.path):
            _put_pair(model, entry, name, _filled_pair(model, entry, adapter.pairs[entry.path]))
    for extra in plan.extras:
        if extra.kind == "rows":
            rows = adapter.token_rows[extra.path]
            put_rows(model, extra, name, rows.ids, rows.rows)
            continue
        with modules.weights_loaded(model, extra.path):
            trained = _put_extra(model, extra, name, None)
        with torch.no_grad():
            for key, parameter in trained.named_parameters():
                parameter.copy_(adapter.extras[f"{extra.path}.{key}"])
    activate(model, name)


def adapter_of(model: nn.Module, name: str = "default", *, base: str = "") -> Adapter:
    """Returns a copy of the adapter `name` as a value on the CPU, in fp32; `base` is the name of its base model."""
    if not has_adapter(model, name):
        raise ConfigError(_unknown(model, name))
    pairs: dict[str, Pair] = {}
    extras: dict[str, Tensor] = {}
    token_rows: dict[str, TokenRows] = {}
    for path, part in adapter_parts(model, name):
        if isinstance(part, LoraPair):
            if part.rank:
                pairs[path] = part.value()
        elif isinstance(part, TrainedRows):
            ids = tuple(int(number) for number in part.ids.tolist())
            token_rows[path] = TokenRows(ids, _copy(part.values), part.tokens, part.tied)
        else:
            extras.update({f"{path}.{key}": _copy(parameter) for key, parameter in part.named_parameters()})
    return Adapter(pairs, extras, token_rows, base, model_type_to_keep(getattr(getattr(model, "config", None), "model_type", "")))


def trained_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Returns all parameters of the adapter `name`, in model order, by names such as `….q_proj.A`; shared rows once."""
    if not has_adapter(model, name):
        raise ConfigError(_unknown(model, name))
    return {f"{path}.{key}": parameter for path, part in adapter_parts(model, name) for key, parameter in part.named_parameters()}


def tokens_of_experts(model: nn.Module) -> dict[str, list[int]]:
    """Returns for each adapted block of experts, by its path, how many tokens of training each expert saw.

    Counts begin when the block gets its first pair.
    """
    layers = ((path, layer) for path, layer in modules.adapted_layers(model) if isinstance(layer, LoraExperts))
    return {path: [layer.tokens[expert] for expert in range(layer.count)] for path, layer in layers}


def keep_terms(model: nn.Module, path: str, terms: Tensor, name: str = "default") -> None:
    """Cuts the pair of the adapter `name` at `path` to some of its rank-one terms, permanently (core/lowrank).

    A pair that keeps none stays with rank 0, so that neighbouring layers compute as before; it is not part of the adapter as a
    value, and `drop_empty` removes it. Raises ConfigError if there is no pair.
    """
    outer, _, leaf = path.rpartition(".")
    layer, block = modules.find(model, path), modules.find(model, outer)
    adapted = layer if isinstance(layer, AdaptedLayer) else block
    part = adapted.adapters[name] if isinstance(adapted, AdaptedLayer) and name in adapted.adapters else None
    pair = part[leaf] if isinstance(part, ExpertPairs) and leaf in part else part
    if not isinstance(pair, LoraPair) or not isinstance(adapted, AdaptedLayer):
        raise ConfigError(f"The adapter '{name}' has no pair at '{path}'.")
    pair.keep(terms)
    adapted.selection.changed(name)


def drop_empty(model: nn.Module, name: str = "default") -> None:
    """Removes the pairs of rank 0 of the adapter `name`; a layer without others becomes its own module again."""
    empty = {path for path, part in adapter_parts(model, name) if isinstance(part, LoraPair) and part.rank == 0}
    for path, layer in list(modules.adapted_layers(model)):
        part = dict(layer.adapters).get(name)
        if isinstance(part, ExpertPairs):
            for leaf in [leaf for leaf in part if f"{path}.{leaf}" in empty]:
                del part[leaf]
        if path in empty or (isinstance(part, ExpertPairs) and not len(part)):
            layer.detach(name)
            if not len(layer.adapters):
                modules.replace(model, path, layer.original)


def adapter_names(model: nn.Module) -> list[str]:
    """Returns the names of the adapters on the model, in the order of their arrival."""
    return list(dict.fromkeys(name for _, layer in modules.adapted_layers(model) for name in layer.adapters))


def has_adapter(model: nn.Module, name: str) -> bool:
    """True if an adapter `name` is on the model; faster than `adapter_names`."""
    return any(name in layer.adapters for _, layer in modules.adapted_layers(model))


def adapter_parts(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Returns (path, pair, rows or trained copy) of one adapter, in model order; rows that a tied head shares once."""
    found: list[tuple[str, nn.Module]] = []
    for path, layer in modules.adapted_layers(model):
        if name not in layer.adapters:
            continue
        part = layer.adapters[name]
        if isinstance(part, ExpertPairs):
            found += [(f"{path}.{leaf}", pair) for leaf, pair in part.items()]
        elif not (isinstance(part, TrainedRows) and part.tied == path):
            found.append((path, part))
    return found


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()


def _unknown(model: nn.Module, name: str) -> str:
    names = adapter_names(model)
    return f"No adapter '{name}' is on the model (it has {', '.join(names) or 'none'}).{nearest(name, names)}"


def _check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"Adapter name '{name}' cannot be used; take letters, digits, - and _, such as 'default'.")
    if has_adapter(model, name):
        raise ConfigError(f"An adapter '{name}' is already on the model; choose another name or eject it first.")


def _check_paths(model: nn.Module, plan: Plan) -> None:
    """Raises ConfigError for every place of the plan that the model lacks, has in another shape, or uses in another way."""
    problems = Problems("The plan does not fit this model")
    for entry in plan.entries:
        module = _pair_module(model, entry)
        current = modules.find(model, _module_path(entry))
        if module is None:
            problems.add(f"'{entry.path}': the model has no such module.")
        elif isinstance(current, AdaptedLayer) and type(current) is not _layer_class(entry):
            problems.add(f"'{entry.path}': another adapter uses it as {type(current).__name__}; eject that one first.")
        elif (shape := _shape(module, entry)) != entry.shape:
            problems.add(f"'{entry.path}': planned as {entry.kind} {entry.shape}, but it is a {type(module).__name__} {shape}.")
    for extra in plan.extras:
        wanted = TrainedModule if extra.kind == "module" else TokenRowsLayer
        current = modules.find(model, extra.path)
        if current is None:
            problems.add(f"'{extra.path}': the model has no such module.")
        elif isinstance(current, AdaptedLayer) and not isinstance(current, wanted):
            problems.add(f"'{extra.path}': another adapter uses it as {type(current).__name__}; eject that one first.")
        elif any(path.startswith(f"{extra.path}.") for path, _ in modules.adapted_layers(model)):
            problems.add(f"'{extra.path}': another adapter has pairs within it; eject that one first.")
    problems.raise_if_any()


def _shape(module: nn.Module, entry: PlanEntry) -> tuple[int, ...] | None:
    """The shape that `module` has for a pair of the planned kind; None where it is not of that kind."""
    if entry.kind == "experts":
        leaf = _expert_leaf(entry)
        return stack_shape(module, leaf) if leaf in modules.expert_stacks(module) else None
    return modules.weight_shape(module, entry.kind) if modules.kind_of(module) == entry.kind else None


def _freeze(model: nn.Module) -> None:
    for _, module in modules.original_modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def _expert_leaf(entry: PlanEntry) -> str:
    return entry.path.rpartition(".")[2] if entry.kind == "experts" else ""


def _module_path(entry: PlanEntry) -> str:
    return entry.path.rpartition(".")[0] if entry.kind == "experts" else entry.path


def _pair_module(model: nn.Module, entry: PlanEntry) -> nn.Module:
    return modules.unwrapped(cast(nn.Module, modules.find(model, _module_path(entry))))


def _frozen_rows(model: nn.Module, entry: PlanEntry) -> tuple[Callable[[], Tensor], torch.device]:
    return modules.frozen_rows(_pair_module(model, entry), entry.kind, _expert_leaf(entry) or "weight")


def _layer_class(entry: PlanEntry) -> type[AdaptedLayer]:
    classes: dict[str, type[AdaptedLayer]] = {"embedding": LoraEmbedding, "conv2d": LoraConv2d, "experts": LoraExperts}
    return classes.get(entry.kind, LoraLinear)


def _put_pair(model: nn.Module, entry: PlanEntry, name: str, pair: LoraPair) -> None:
    path = _module_path(entry)
    module = cast(nn.Module, modules.find(model, path))
    if isinstance(module, AdaptedLayer):
        layer = module
    else:
        kind = _layer_class(entry)
        if kind is LoraExperts:
            layer = experts_layer(module, path, choices_at(model, path))
        else:
            layer = LoraLinear(module, base_of(module, entry.kind)) if kind is LoraLinear else cast(Any, kind)(module)
        modules.replace(model, path, layer)
    if entry.kind == "experts":
        if name not in layer.adapters:
            layer.attach(name, ExpertPairs())
        cast(ExpertPairs, layer.adapters[name])[_expert_leaf(entry)] = pair
    else:
        layer.attach(name, pair)
    layer.train(modules.unwrapped(module).training)


def experts_layer(module: nn.Module, path: str, choices: int | None = None) -> LoraExperts:
    """Returns the block of experts at `path`, wrapped for pairs. A token chooses at most `choices` of them; None: unknown.

    Raises ConfigError unless Lorakeet's computation of the experts equals the block's own, also on large activations.
    """
    layer = LoraExperts(module)
    layer.choices = choices
    x = torch.randn(4, input_width(module), generator=torch.Generator().manual_seed(0)).to(*placed_as(module))
    base = layer.base(first_stack(module), 0)
    for size in modules.probe_sizes(base.matmul, x):  # of about the size of the product's numbers
        _check_experts_on(layer, path, x * size)
    return layer


def _check_experts_on(layer: LoraExperts, path: str, x: Tensor) -> None:
    every = len(stack_of(layer.original, first_stack(layer.original)))  # with those that pass their tokens through
    index = torch.arange(8, device=x.device).view(4, 2) % every
    index[-1, -1] = every - 1
    weights = torch.tensor([[0.7, 0.3]], device=x.device, dtype=x.dtype).expand(4, 2)
    given: tuple[Tensor, ...] = x, index, weights
    if unsaid_transposed(layer.original):  # each row for the one expert that it chose
        chosen = torch.nn.functional.one_hot(index[:, 0], layer.count).t()[..., None]
        given = ((x * chosen).to(x.dtype).flatten(0, 1),)
    with torch.no_grad():
        theirs = layer(*given)
        layer.attach("check", ExpertPairs())
        layer.active = "check"
        ours = layer(*given)
        layer.detach("check")
    if not (ours - theirs).abs().max() <= 8 * torch.finfo(x.dtype).eps * theirs.abs().max():
        raise ConfigError(
            f"'{path}' cannot be adapted: its {type(layer.original).__name__} does not compute "
            "down(act(gate)·up); leave it out with lora.exclude_modules."
        )


def choices_at(model: nn.Module, path: str) -> int | None:
    """How many experts of the block at `path` a token chooses, as the module around it says; None where it does not."""
    parent = modules.find(model, path.rpartition(".")[0])
    found = getattr(modules.unwrapped(parent), "top_k", None) if parent is not None else None
    return found if isinstance(found, int) and found > 0 else None


def _filled_pair(model: nn.Module, entry: PlanEntry, value: Pair) -> LoraPair:
    weight, device = _frozen_rows(model, entry)
    kind = DoraPair if entry.variant == "dora" else LoraPair
    pair = kind(entry, device=device, bias=value.bias is not None)
    if isinstance(pair, DoraPair):
        pair.measure(weight())
    pair.load(value)
    return pair


def _put_extra(model: nn.Module, extra: ExtraEntry, name: str, token_ids: tuple[int, ...] | None) -> nn.Module:
    module = cast(nn.Module, modules.find(model, extra.path))
    if extra.kind == "rows":
        first = cast(Tensor, modules.unwrapped(module).weight).shape[0]
        put_rows(model, extra, name, tuple(range(first, first + len(extra.tokens))) if token_ids is None else token_ids)
        return module
    layer = module if isinstance(module, TrainedModule) else TrainedModule(modules.unwrapped(module))
    trained = layer.new_copy()
    layer.attach(name, trained)
    layer.train(modules.unwrapped(module).training)
    if layer is not module:
        modules.replace(model, extra.path, layer)
    return trained


def put_rows(model: nn.Module, entry: ExtraEntry, name: str, ids: tuple[int, ...], values: Tensor | None = None) -> None:
    """Adds trained rows for `ids` under `name` to the layer at `entry.path` and to a head tied to it.

    The frozen weight grows by the mean of its rows, which is also the initial value of the trained rows, unless `values`
    (rows, hidden) are given. Old rows keep their bits.
    """
    layer = _layer(model, entry.path)
    tied = _layer(model, entry.tied) if entry.tied else None
    mean = layer.weight[: layer.rows_before].mean(0, dtype=torch.float32)
    _grow([layer] if tied is None else [layer, tied], max(ids) + 1, mean)
    _set_vocabulary(model, layer.weight.shape[0])
    start = mean.expand(len(ids), -1) if values is None else values.to(mean.device)
    rows = TrainedRows(ids, start, tokens=entry.tokens, tied=entry.tied)
    layer.attach(name, rows)
    if tied is not None:
        tied.attach(name, rows)


def shrink(model: nn.Module) -> None:
    """Removes the rows that `put_rows` added to frozen weights."""
    shorter: dict[int, nn.Parameter] = {}  # by the identity of the grown weight, so that tied ones stay tied
    for _, layer in modules.adapted_layers(model):
        if isinstance(layer, TokenRowsLayer) and layer.weight.shape[0] > layer.rows_before:
            grown = layer.weight
            if id(grown) not in shorter:
                shorter[id(grown)] = nn.Parameter(grown.detach()[: layer.rows_before].clone(), requires_grad=False)
            _set_weight(layer.original, shorter[id(grown)])
            _set_vocabulary(model, layer.rows_before)


def _layer(model: nn.Module, path: str) -> TokenRowsLayer:
    module = cast(nn.Module, modules.find(model, path))
    if isinstance(module, TokenRowsLayer):
        return module
    layer = TokenRowsEmbedding(module) if isinstance(module, nn.Embedding) else TokenRowsHead(module)
    layer.train(module.training)
    modules.replace(model, path, layer)
    return layer


def _grow(layers: list[TokenRowsLayer], rows: int, mean: Tensor) -> None:
    weight = layers[0].weight
    missing = rows - weight.shape[0]
    if missing <= 0:
        return
    grown = nn.Parameter(torch.cat([weight.detach(), mean.to(weight.dtype).expand(missing, -1)]), requires_grad=False)
    for layer in layers:
        _set_weight(layer.original, grown)


def _set_weight(module: nn.Module, weight: nn.Parameter) -> None:
    any_module = cast(Any, module)
    any_module.weight = weight
    if isinstance(module, nn.Embedding):
        any_module.num_embeddings = weight.shape[0]
    else:
        any_module.out_features = weight.shape[0]


def _set_vocabulary(model: nn.Module, rows: int) -> None:
    config = getattr(model, "config", None)
    if config is not None:
        config.get_text_config().vocab_size = rows

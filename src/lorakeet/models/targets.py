"""Makes the Plan of a model from the LoRA settings. Reads names and shapes only, so a model on the meta device suffices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lorakeet.core.layers.experts import stack_shape, why_not_experts
from lorakeet.core.math import Kind
from lorakeet.core.plan import ExtraEntry, Plan, PlanEntry, path_range
from lorakeet.core.spec import MEASURED, SUM, LoraSpec, layers_chosen, pattern_value
from lorakeet.errors import Problems, nearest
from lorakeet.formats.peft.renamed_targets import needs_parameter, refused_by_peft
from lorakeet.models import modules
from lorakeet.models.every_weight import every_weight
from lorakeet.models.families import CHOOSING, READ_DIRECTLY, Family, in_group
from lorakeet.quant.construct import weights_in
from lorakeet.quant.stack import PackedStack

KEYWORDS = ("all-linear", "attention", "mlp", "experts", "conv")
_WORDS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn", "feedforward", "moe")}


@dataclass(frozen=True)
class Site:
    """A weight that can have a pair, or the reason why it cannot."""

    path: str
    kind: Kind | None
    shape: tuple[int, ...] = ()
    why_not: str = ""
    experts: bool = False  # of a block's own parameter
    apart: str = "no linear layer"  # why no keyword but conv takes it; empty for linear layers and experts of all-linear


def plan_for(model: nn.Module, spec: LoraSpec, family: Family) -> Plan:
    """Returns the Plan of `spec` for `model`: every pair and extra, in model order.

    Targets are the keywords all-linear (linear layers and experts, without heads, routers and Mamba's out_proj), attention, mlp,
    experts and conv (2-D convolutions, without a UNet's first and last one), or names and path endings. Raises ConfigError with
    every problem.
    """
    spec.check()
    problems = Problems("These LoRA settings do not fit the model")
    sites = list(_sites(model))
    targeted = _targeted(sites, spec, family, problems)
    included = _without_excluded(targeted, sites, spec, problems)
    chosen = _in_layers(included, modules.block_prefix(model, family), spec, problems)
    _refuse_unfit(chosen, problems)
    entries = tuple(_entry(site, spec) for site in chosen if site.kind is not None)
    _check_patterns(entries, spec, problems)
    _check_ranks(entries, problems)
    _check_variants(entries, problems)
    _check_renamed(entries, _kind_of(model), problems)
    extras = _plan_extras(model, spec, [entry.path for entry in entries], problems)
    if not problems.errors and not entries and not extras:
        problems.add("Nothing would be trained: every target is excluded or outside lora.layers. Widen one of them.")
    problems.raise_if_any()
    left_out = {site.path: site.why_not or site.apart or "not in lora.target_modules" for site in sites}
    left_out |= {site.path: "in lora.exclude_modules" for site in targeted}
    left_out |= {site.path: f"outside lora.layers {spec.layers}" for site in included}
    left_out |= {site.path: "" for site in chosen}
    return Plan(entries, extras, weights_in(model), every_weight(model, left_out))


def _sites(model: nn.Module) -> Iterable[Site]:
    """Yields every module below the model (experts by parameter), in model order."""
    outside = modules.outside_text(model)
    for path, module in modules.original_modules(model):
        if not path or isinstance(module, PackedStack):  # named as a parameter of its block
            continue
        if stacks := modules.expert_stacks(module):
            refusal = why_not_experts(module)
            why = f"part of a {type(module).__name__} whose experts cannot be adapted: {refusal}" if refusal else ""
            yield Site(path, None, (), f"a {type(module).__name__}, which contains {', '.join(stacks)}; name these instead")
            apart = "" if refusal else _apart_in_peft(model, path)
            for name in stacks:
                shape = () if refusal else stack_shape(module, name)
                yield Site(f"{path}.{name}", None if refusal else "experts", shape, why, experts=True, apart=apart)
            continue
        kind = modules.kind_of(module)
        if kind is None:
            yield Site(path, None, (), modules.why_no_pair(module))
        elif path.rpartition(".")[2] in READ_DIRECTLY.get(_kind_of(model), ()):
            why = f"a {type(module).__name__} whose weight is read without calling it, so a pair would do nothing"
            yield Site(path, None, (), why)
        else:
            beside = any(f"{path}.".startswith(f"{part}.") for part in outside)
            apart = "outside the text part, adapted by name only" if beside else ""
            yield Site(path, kind, modules.weight_shape(module, kind), apart=apart or _apart(model, path, module, kind))


def _apart(model: nn.Module, path: str, module: nn.Module, kind: Kind) -> str:
    """Why all-linear leaves a module out that could have a pair; empty if it takes it."""
    if kind not in ("linear", "conv1d"):
        return {"embedding": "an embedding, adapted by name only", "conv2d": "no linear layer (conv names it)"}[kind]
    if modules.is_head(model, path, module):
        return "the head, adapted by name only"
    if modules.is_router(model, path):
        return "a router, adapted by name only"
    if set(path.split(".")) & set(CHOOSING):
        return "it chooses tokens, and no gradient reaches it"
    return _apart_in_peft(model, path)


def _apart_in_peft(model: nn.Module, path: str) -> str:
    return "refused by PEFT, adapted by name only" if refused_by_peft(_kind_of(model), path) else ""


def _kind_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def named(path: str, name: str) -> bool:
    """True if `name` is `path` or the end of it after a dot."""
    return path == name or path.endswith(f".{name}")


def _in_keyword(site: Site, keyword: str, family: Family) -> bool:
    if keyword == "conv":
        return site.kind == "conv2d" and not named(site.path, "conv_in") and not named(site.path, "conv_out")
    if site.apart:
        return False
    if keyword == "all-linear":
        return True
    experts = site.kind in ("experts", None)
    if keyword == "experts":
        return experts
    if experts:
        return keyword == "mlp"
    names = family.attention if keyword == "attention" else family.mlp
    return in_group(site.path, names, _WORDS[keyword])


def _targeted(sites: list[Site], spec: LoraSpec, family: Family, problems: Problems) -> list[Site]:
    wanted: set[str] = set()
    for target in spec.target_modules:
        if target in KEYWORDS:
            found = {site.path for site in sites if _in_keyword(site, target, family)}
        else:
            found = {site.path for site in sites if named(site.path, target)}
        if not found:
            names = leaf_names(site.path for site in sites if site.kind is not None)
            problems.add(
                f"No module matches target '{target}' (the model has {listed(names) or 'none that can be adapted'})."
                f"{nearest(target, [*names, *KEYWORDS])}"
            )
        wanted |= found
    return [site for site in sites if site.path in wanted]


def _without_excluded(chosen: list[Site], sites: list[Site], spec: LoraSpec, problems: Problems) -> list[Site]:
    dropped: set[str] = set()
    for pattern in spec.exclude_modules:
        try:
            found = {site.path for site in sites if named(site.path, pattern) or re.fullmatch(pattern, site.path)}
        except re.error as error:
            problems.add(f"lora.exclude_modules {pattern!r} is no module of the model and not a regular expression: {error}.")
            continue
        if not found:
            names = leaf_names(site.path for site in sites)
            offered = nearest(pattern, names) or f" It has {listed(names)}; name one of them, or leave it out."
            problems.add(f"lora.exclude_modules '{pattern}' matches no module of the model.{offered}")
        dropped |= found
    return [site for site in chosen if not any(site.path == path or site.path.startswith(f"{path}.") for path in dropped)]


def _in_layers(chosen: list[Site], blocks: tuple[str, int], spec: LoraSpec, problems: Problems) -> list[Site]:
    """Returns the sites in the wanted blocks or outside all blocks."""
    if spec.layers == "all":
        return chosen
    prefix, count = blocks
    if not count:
        problems.add(f"lora.layers is '{spec.layers}', but this model has no list of blocks; use all.")
        return chosen
    numbers = layers_chosen(spec.layers, count)
    beyond = sorted(number for number in numbers if number >= count)
    if spec.layers.startswith("top:") and int(spec.layers[4:]) > count:
        problems.add(f"lora.layers is '{spec.layers}', but the model has {count} blocks; take top:{count} at most.")
    elif beyond:
        problems.add(f"lora.layers is '{spec.layers}', but the model's {count} blocks are 0 to {count - 1}; {beyond[0]} is none.")

    def wanted(path: str) -> bool:
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)\.", path)
        return inside is None or int(inside[1]) in numbers

    return [site for site in chosen if wanted(site.path)]


def _refuse_unfit(chosen: list[Site], problems: Problems) -> None:
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for site in chosen:
        if site.kind is None:
            groups.setdefault((_without_numbers(site.path), site.why_not, site.experts), []).append(site.path)
    for (_, why, experts), paths in groups.items():
        remedy = " Leave the experts out with --lora.exclude_modules experts." if experts else ""
        problems.add(f"'{path_range(paths)}' cannot be adapted: it is {why}.{remedy}")


def _entry(site: Site, spec: LoraSpec) -> PlanEntry:
    assert site.kind is not None
    rank, alpha = pattern_value(spec.rank_pattern, site.path), pattern_value(spec.alpha_pattern, site.path)
    return PlanEntry(
        path=site.path,
        kind=site.kind,
        shape=site.shape,
        rank=spec.rank if rank is None else int(rank),
        alpha=spec.alpha if alpha is None else alpha,
        scale_rule=spec.scale_rule,
        variant=spec.variant,
        start=spec.start,
        dropout=0.0 if site.kind == "embedding" else spec.dropout,  # an embedding's inputs are ids: no dropout
    )


def _check_patterns(entries: tuple[PlanEntry, ...], spec: LoraSpec, problems: Problems) -> None:
    for name, pattern in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for key in pattern:
            if key.endswith(SUM):  # of an earlier adapter, whose modules are compared with the plan by their names
                continue
            if not any(pattern_value({key: 1}, entry.path) for entry in entries):
                names = leaf_names(entry.path for entry in entries)
                problems.add(f"lora.{name} '{key}' matches none of the adapted modules ({listed(names)}).{nearest(key, names)}")


def _check_ranks(entries: tuple[PlanEntry, ...], problems: Problems) -> None:
    groups: dict[tuple[str, ...], list[PlanEntry]] = {}
    for entry in entries:
        if entry.rank > entry.largest_rank or (entry.start == "orthogonal" and entry.rank % 2):
            groups.setdefault((_without_numbers(entry.path), str(entry.shape), str(entry.rank)), []).append(entry)
    for same in groups.values():
        where, first = path_range([entry.path for entry in same]), same[0]
        if first.rank > first.largest_rank:
            shape = "×".join(map(str, first.shape))
            problems.add(
                f"Rank {first.rank} is larger than {where} ({shape}) allows: at most {first.largest_rank}. "
                "Lower lora.rank, or give it its own in lora.rank_pattern."
            )
        else:
            problems.add(f"lora.start orthogonal needs an even rank, but {where} has rank {first.rank}.")


def _check_variants(entries: tuple[PlanEntry, ...], problems: Problems) -> None:
    for kind in dict.fromkeys(entry.kind for entry in entries):
        same = [entry for entry in entries if entry.kind == kind]
        example = f"{kind} weights such as '{same[0].path}'"
        if same[0].variant == "dora" and kind in ("embedding", "experts"):
            problems.add(f"lora.variant dora cannot be put on {example}; exclude them or use lora.variant lora.")
        if same[0].start in ("pissa", "olora", *MEASURED) and kind not in ("linear", "conv1d"):
            problems.add(
                f"lora.start {same[0].start} is for linear layers, not for {example}; exclude them or use lora.start kaiming."
            )


def _check_renamed(entries: tuple[PlanEntry, ...], model_type: str, problems: Problems) -> None:
    """Adds to `problems` the matrices whose DoRA pairs PEFT could not read."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        if entry.variant == "dora" and entry.kind == "linear" and needs_parameter(model_type, entry.path):
            groups.setdefault(_without_numbers(entry.path), []).append(entry.path)
    for paths in groups.values():
        problems.add(
            f"lora.variant dora on '{path_range(paths)}' cannot be read by PEFT, which takes this name for an expert of a "
            f"'{model_type}' model; exclude these modules (lora.exclude_modules) or use lora.variant lora."
        )


def _without_numbers(path: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def leaf_names(paths: Iterable[str]) -> list[str]:
    """Returns the last names of `paths`, each once, in order, without list indices."""
    return list(dict.fromkeys(leaf for path in paths if not (leaf := path.rpartition(".")[2]).isdigit()))


def listed(names: list[str], most: int = 12) -> str:
    """Returns the names as text, or the first ones and the number of the others."""
    return ", ".join(names[:most]) + (f", … {len(names) - most} more" if len(names) > most else "")


def _plan_extras(model: nn.Module, spec: LoraSpec, adapted: list[str], problems: Problems) -> tuple[ExtraEntry, ...]:
    """Returns the extras of `spec`; `adapted` are the paths with a pair, which no extra may share."""
    extras = [*_whole_modules(model, spec, problems), *_new_rows(model, spec, problems)]
    taken = [path for extra in extras for path in (extra.path, extra.tied) if path]  # a tied head gets the new rows too
    for extra in dict.fromkeys(taken):
        clash = [path for path in adapted if path == extra or path.startswith(f"{extra}.")]
        if clash:
            problems.add(f"'{extra}' would be trained as an extra, and '{clash[0]}' gets a pair as well; choose one.")
        inside = [path for path in taken if path.startswith(f"{extra}.")]
        if inside:
            problems.add(f"'{extra}' and '{inside[0]}' within it are both extras; name one.")
    if len(set(taken)) < len(taken):
        problems.add("New tokens train rows of a module that lora.extra_modules trains whole; leave it out of extra_modules.")
    return tuple(extras)


def _whole_modules(model: nn.Module, spec: LoraSpec, problems: Problems) -> list[ExtraEntry]:
    every = [(path, module) for path, module in modules.original_modules(model) if path]
    found: dict[str, ExtraEntry] = {}
    for name in spec.extra_modules:
        matches = [(path, module) for path, module in every if path == name or path.endswith(f".{name}")]
        if not matches:
            leaves = list(dict.fromkeys(path.rpartition(".")[2] for path, _ in every))
            problems.add(f"No module matches lora.extra_modules '{name}'.{nearest(name, leaves)}")
        for path, module in matches:
            count = sum(parameter.numel() for parameter in module.parameters())
            if modules.is_packed(module):
                problems.add(
                    f"lora.extra_modules '{path}' has packed weights, which are never trained; leave it out, or keep the model's "
                    "weights with model.quantize none."
                )
            elif count:
                found[path] = ExtraEntry(path, "module", (count,))
            else:
                problems.add(f"lora.extra_modules '{path}' is a {type(module).__name__} without parameters; leave it out.")
    return list(found.values())


def _new_rows(model: nn.Module, spec: LoraSpec, problems: Problems) -> list[ExtraEntry]:
    """Returns rows of the input embedding, shared with a tied head; an untied head gets its own rows."""
    if not spec.new_tokens:
        return []
    repeated = sorted({token for token in spec.new_tokens if spec.new_tokens.count(token) > 1 or not token})
    if repeated:
        problems.add(f"lora.new_tokens {repeated[0]!r} is empty or named twice; name each token once.")
    embedding, head = modules.input_layer(model), modules.output_layer(model)
    if not isinstance(embedding, nn.Embedding):
        problems.add(f"lora.new_tokens needs a token embedding, which {type(model).__name__} does not have.")
        return []
    path, head_path = modules.path_of(model, embedding), modules.path_of(model, head)
    shape = (len(spec.new_tokens), embedding.embedding_dim)
    if head is None:
        return [ExtraEntry(path, "rows", shape, spec.new_tokens)]
    if cast(Any, head).weight is embedding.weight:
        return [ExtraEntry(path, "rows", shape, spec.new_tokens, tied=head_path)]
    if type(head) is not nn.Linear or head.bias is not None:
        problems.add(f"lora.new_tokens needs a plain head without bias; '{head_path}' is a {type(head).__name__} with more.")
    return [ExtraEntry(path, "rows", shape, spec.new_tokens), ExtraEntry(head_path, "rows", shape, spec.new_tokens)]

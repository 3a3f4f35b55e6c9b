"""Whether an adapter fits a model, and the Plan that it amounts to there."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.core.math import Kind
from lorakeet.core.plan import ExtraEntry, Plan, PlanEntry
from lorakeet.errors import ConfigError, nearest
from lorakeet.models import modules
from lorakeet.quant.construct import weights_in


def plan_of(model: nn.Module, adapter: Adapter) -> Plan:
    """The Plan whose pairs and extras are exactly those of `adapter`.

    Raises ConfigError "The adapter does not fit this base" with every missing module and wrong shape.
    """
    if not adapter.parameters:
        raise ConfigError("The adapter holds nothing: no pairs, no whole modules, no token rows. Check how it was made.")
    wrong: list[str] = []
    places = {path: module for path, module in modules.original_modules(model) if path}
    entries = [entry for path, pair in adapter.pairs.items() if (entry := _entry(places, path, pair, wrong))]
    extras = [*_whole(model, places, adapter, wrong), *_rows(places, adapter, wrong, head=modules.output_layer(model))]
    wrong += _clashes(entries, extras)
    if wrong:
        heading = f"The adapter does not fit this base ({len(wrong)} problem{'s' if len(wrong) > 1 else ''}):"
        advice = "Use the base that it was trained on" + (f": {adapter.base}." if adapter.base else ".")
        raise ConfigError("\n".join([heading, *(f"  - {line}" for line in wrong), advice]))
    return Plan(tuple(entries), tuple(extras), weights_in(model))


def _entry(places: dict[str, nn.Module], path: str, pair: Pair, wrong: list[str]) -> PlanEntry | None:
    found = _weight(places, path, pair.kind)
    if isinstance(found, str):
        wrong.append(found)
        return None
    kind, shape = found
    entry = PlanEntry(
        path=path,
        kind=kind,
        shape=shape,
        rank=pair.rank,
        alpha=pair.alpha,
        scale_rule=pair.scale_rule,
        variant="lora" if pair.magnitude is None else "dora",
    )
    shapes = [("A", pair.A, entry.shape_a), ("B", pair.B, entry.shape_b)]
    rows = shape[1] if kind == "embedding" else shape[0]
    shapes += [(name, part, (rows,)) for name, part in (("magnitude", pair.magnitude), ("bias", pair.bias)) if part is not None]
    for name, part, expected in shapes:
        if tuple(part.shape) != expected:
            wrong.append(f"'{path}': {name} is {_shown(tuple(part.shape))}, but this base needs {_shown(expected)}.")
    return entry


def _weight(places: dict[str, nn.Module], path: str, kind: Kind) -> tuple[Kind, tuple[int, ...]] | str:
    """The kind and shape of the frozen weight at `path`, or what is wrong with it.

    A pair for a linear weight fits GPT-2's Conv1D and the other way round: the factors are the same, and files mix them up.
    """
    parent, _, leaf = path.rpartition(".")
    if kind == "experts":
        block = places.get(parent)
        stacks = modules.expert_stacks(block) if block is not None else []
        if block is None or leaf not in stacks:
            return f"'{path}': this base has no such expert parameter.{nearest(path, [f'{parent}.{stack}' for stack in stacks])}"
        return kind, tuple(block.get_parameter(leaf).shape)
    module = places.get(path)
    if module is None:
        return f"'{path}': this base has no such module.{nearest(path, places)}"
    here = modules.kind_of(module)
    if here is None or (here != kind and {here, kind} != {"linear", "conv1d"}):
        return f"'{path}': the pair is for a {kind} weight, but this base has a {type(module).__name__} there."
    return here, modules.weight_shape(module, here)


def _whole(model: nn.Module, places: dict[str, nn.Module], adapter: Adapter, wrong: list[str]) -> list[ExtraEntry]:
    """One entry for each outermost module that owns trained parameters of the adapter."""
    owners: dict[str, None] = {}
    for path, tensor in adapter.extras.items():
        owner, _, leaf = path.rpartition(".")
        parameter = dict(places[owner].named_parameters(recurse=False)).get(leaf) if owner in places else None
        if owner in places and leaf == "weight" and owner in adapter.pairs and modules.is_packed(places[owner]):
            continue  # a copy of the frozen weight beside its pair, before it was packed: nothing to compare it with
        if parameter is None:
            wrong.append(f"'{path}': this base has no such parameter.{nearest(path, [f'{place}.{leaf}' for place in places])}")
        elif parameter.shape != tensor.shape:
            needed, given = _shown(tuple(parameter.shape)), _shown(tuple(tensor.shape))
            wrong.append(f"'{path}': it is {given}, but this base needs {needed}.")
        elif owner in adapter.pairs and leaf == "weight":
            # PEFT saves the frozen weight beside the pair of an embedding or head; the base's own adds nothing.
            if not _is(model, owner, tensor):
                wrong.append(f"'{path}': the adapter has a pair for it and another weight than this base has.")
        else:
            owners[owner] = None
    outer = [owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)]
    entries = []
    for owner in outer:
        names = [f"{owner}.{name}" for name, _ in places[owner].named_parameters()]
        lacking = [name for name in names if name not in adapter.extras]
        wrong += [f"'{name}': the adapter trains '{owner}' whole, but lacks this part." for name in lacking]
        entries.append(ExtraEntry(owner, "module", (sum(p.numel() for p in places[owner].parameters()),)))
    return entries


def _is(model: nn.Module, path: str, weight: Tensor) -> bool:
    """Whether the module at `path` has this weight; of a model without numbers nothing else is said."""
    with modules.weights_loaded(model, path):
        held = modules.unwrapped(cast(nn.Module, modules.find(model, path))).get_parameter("weight")
        return held.is_meta or torch.equal(held.detach().cpu().float(), weight.float())


def _rows(
    places: dict[str, nn.Module], adapter: Adapter, wrong: list[str], *, head: nn.Module | None
) -> list[ExtraEntry]:
    """One entry for each embedding with trained rows. A head that is tied to it shares them, whether the file says so or not."""
    head_path = next((path for path, module in places.items() if module is head), "") if head is not None else ""
    entries = []
    for path, rows in adapter.token_rows.items():
        problem = _rows_problem(places, path, rows)
        if problem:
            wrong.append(problem)
        shared = head_path not in ("", path) and cast(Any, head).weight is getattr(places.get(path), "weight", None)
        tied = rows.tied or (head_path if shared else "")
        entries.append(ExtraEntry(path, "rows", tuple(rows.rows.shape), rows.tokens, tied))
    return entries


def _rows_problem(places: dict[str, nn.Module], path: str, rows: TokenRows) -> str:
    module = places.get(path)
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        return f"'{path}': this base has no embedding or head there to take trained token rows.{nearest(path, places)}"
    hidden = module.weight.shape[1]
    if tuple(rows.rows.shape) != (len(rows.ids), hidden):
        return f"'{path}': token rows are {_shown(tuple(rows.rows.shape))}, but this base needs {len(rows.ids)}×{hidden}."
    head = places.get(rows.tied) if rows.tied else None
    if rows.tied and (head is None or cast(Any, head).weight is not module.weight):
        return f"'{path}': its token rows are shared with '{rows.tied}', which this base does not tie to it."
    return ""


def _clashes(entries: list[PlanEntry], extras: list[ExtraEntry]) -> list[str]:
    """Places that the adapter itself uses twice."""
    taken = [entry.path for entry in entries]
    return [
        f"'{extra.path}': the adapter has both a pair and whole weights or rows for it."
        for extra in extras
        if any(path == extra.path or path.startswith(f"{extra.path}.") for path in taken)
    ]


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))

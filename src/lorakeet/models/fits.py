"""Checks that an adapter fits a model, and makes its Plan there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.core.layers.experts import stack_shape
from lorakeet.core.math import Kind
from lorakeet.core.plan import ExtraEntry, Plan, PlanEntry
from lorakeet.errors import ConfigError, nearest
from lorakeet.models import modules
from lorakeet.quant.construct import weights_in


def plan_of(model: nn.Module, adapter: Adapter) -> Plan:
    """Returns the Plan with exactly the pairs and extras of `adapter`.

    Raises ConfigError "The adapter does not fit this base" with every missing module and wrong shape.
    """
    if not adapter.parameters:
        raise ConfigError("The adapter is empty: no pairs, no whole modules, no token rows. Check how it was made.")
    wrong: list[str] = []
    by_path = {path: module for path, module in modules.original_modules(model) if path}
    entries = [entry for path, pair in adapter.pairs.items() if (entry := _entry(by_path, path, pair, wrong))]
    extras = [*_whole(model, by_path, adapter, wrong), *_rows(by_path, adapter, wrong, head=modules.output_layer(model))]
    wrong += _clashes(entries, extras)
    if wrong:
        heading = f"The adapter does not fit this base ({len(wrong)} problem{'s' if len(wrong) > 1 else ''}):"
        advice = "Use the base that it was trained on" + (f": {adapter.base}." if adapter.base else ".")
        raise ConfigError("\n".join([heading, *(f"  - {line}" for line in wrong), advice]))
    return Plan(tuple(entries), tuple(extras), weights_in(model))


def _entry(by_path: dict[str, nn.Module], path: str, pair: Pair, wrong: list[str]) -> PlanEntry | None:
    found = _weight(by_path, path, pair.kind)
    if isinstance(found, str):
        wrong.append(found)
        return None
    return checked_entry(path, *found, pair, wrong.append)


def checked_entry(path: str, kind: Kind, shape: tuple[int, ...], pair: Pair, add: Callable[[str], None]) -> PlanEntry:
    """Returns the entry of `pair` on a weight of this kind and shape, and calls `add` with a message for each wrong shape."""
    entry = PlanEntry(path, kind, shape, pair.rank, pair.alpha, pair.scale_rule, "lora" if pair.magnitude is None else "dora")
    shapes = [("A", pair.A, entry.shape_a), ("B", pair.B, entry.shape_b)]
    rows = shape[1] if kind == "embedding" else shape[0]
    shapes += [(name, part, (rows,)) for name, part in (("magnitude", pair.magnitude), ("bias", pair.bias)) if part is not None]
    for name, part, expected in shapes:
        if tuple(part.shape) != expected:
            add(f"'{path}': {name} is {_shown(tuple(part.shape))}, but this base needs {_shown(expected)}.")
    return entry


def _weight(by_path: dict[str, nn.Module], path: str, kind: Kind) -> tuple[Kind, tuple[int, ...]] | str:
    """Returns the kind and shape of the frozen weight at `path`, or what is wrong with it.

    A pair for a linear weight fits GPT-2's Conv1D and the other way round: the factors are the same, and files mix them up.
    """
    parent, _, leaf = path.rpartition(".")
    if kind == "experts":
        block = by_path.get(parent)
        stacks = modules.expert_stacks(block) if block is not None else []
        if block is None or leaf not in stacks:
            return f"'{path}': this base has no such expert parameter.{nearest(path, [f'{parent}.{stack}' for stack in stacks])}"
        return kind, stack_shape(block, leaf)
    module = by_path.get(path)
    if module is None:
        return f"'{path}': this base has no such module.{nearest(path, by_path)}"
    here = modules.kind_of(module)
    if here is None or (here != kind and {here, kind} != {"linear", "conv1d"}):
        return f"'{path}': the pair is for a {kind} weight, but this base has a {type(module).__name__} there."
    return here, modules.weight_shape(module, here)


def _whole(model: nn.Module, by_path: dict[str, nn.Module], adapter: Adapter, wrong: list[str]) -> list[ExtraEntry]:
    """Returns an entry for each outermost module with trained parameters of the adapter."""
    owners: dict[str, None] = {}
    for path, tensor in adapter.extras.items():
        owner, _, leaf = path.rpartition(".")
        parameter = dict(by_path[owner].named_parameters(recurse=False)).get(leaf) if owner in by_path else None
        if owner in by_path and leaf == "weight" and owner in adapter.pairs and modules.is_packed(by_path[owner]):
            continue  # a copy of the frozen weight from before it was packed: nothing to compare with
        if parameter is None:
            wrong.append(f"'{path}': this base has no such parameter.{nearest(path, [f'{other}.{leaf}' for other in by_path])}")
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
        names = [f"{owner}.{name}" for name, _ in by_path[owner].named_parameters()]
        lacking = [name for name in names if name not in adapter.extras]
        wrong += [f"'{name}': the adapter trains '{owner}' whole, but lacks this part." for name in lacking]
        entries.append(ExtraEntry(owner, "module", (sum(p.numel() for p in by_path[owner].parameters()),)))
    return entries


def _is(model: nn.Module, path: str, weight: Tensor) -> bool:
    """True if the module at `path` has this weight, or if the model has no numbers."""
    with modules.weights_loaded(model, path):
        own = modules.unwrapped(cast(nn.Module, modules.find(model, path))).get_parameter("weight")
        return own.is_meta or torch.equal(own.detach().cpu().float(), weight.float())


def _rows(by_path: dict[str, nn.Module], adapter: Adapter, wrong: list[str], *, head: nn.Module | None) -> list[ExtraEntry]:
    """Returns an entry for each embedding with trained rows. A tied head shares them, whether the file says so or not."""
    head_path = next((path for path, module in by_path.items() if module is head), "") if head is not None else ""
    entries = []
    tied_weights = {id(getattr(by_path.get(path), "weight", None)): path for path in adapter.token_rows}
    if len(tied_weights) < len(adapter.token_rows):
        names = " and ".join(f"'{path}'" for path in sorted(adapter.token_rows))
        wrong.append(f"{names} have trained token rows each, but this base has one weight for both. Take one out of the adapter.")
    for path, rows in adapter.token_rows.items():
        problem = _rows_problem(by_path, path, rows)
        if problem:
            wrong.append(problem)
        shared = head_path not in ("", path) and cast(Any, head).weight is getattr(by_path.get(path), "weight", None)
        tied = rows.tied or (head_path if shared else "")
        entries.append(ExtraEntry(path, "rows", tuple(rows.rows.shape), rows.tokens, tied))
    return entries


def _rows_problem(by_path: dict[str, nn.Module], path: str, rows: TokenRows) -> str:
    module = by_path.get(path)
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        return f"'{path}': this base has no embedding or head there to take trained token rows.{nearest(path, by_path)}"
    hidden = module.weight.shape[1]
    if tuple(rows.rows.shape) != (len(rows.ids), hidden):
        return f"'{path}': token rows are {_shown(tuple(rows.rows.shape))}, but this base needs {len(rows.ids)}×{hidden}."
    if problem := rows.problem(module.weight.shape[0]):
        return f"'{path}': {problem}"
    head = by_path.get(rows.tied) if rows.tied else None
    if rows.tied and (head is None or cast(Any, head).weight is not module.weight):
        return f"'{path}': its token rows are shared with '{rows.tied}', which this base does not tie to it."
    return ""


def _clashes(entries: list[PlanEntry], extras: list[ExtraEntry]) -> list[str]:
    """Returns the problems of modules that the adapter uses twice."""
    taken = [entry.path for entry in entries]
    found = [
        f"'{extra.path}': the adapter has both a pair and whole weights or rows for it."
        for extra in extras
        if any(path == extra.path or path.startswith(f"{extra.path}.") for path in taken)
    ]
    taken += [extra.path for extra in extras]
    return found + [
        f"'{extra.tied}': the adapter changes it, and this base ties it to '{extra.path}', whose trained token rows it shares."
        for extra in extras
        if extra.tied in taken
    ]


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))

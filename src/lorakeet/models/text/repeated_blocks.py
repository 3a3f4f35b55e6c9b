"""Checks if all blocks of a model are equal, so that its memory can be extrapolated from a few of them (memory/forecast).

Blocks are equal if they have the same modules, with the same tensors, packing, settings and pairs. They are not if every sixth
block attends to all tokens (Gemma), a mixture of experts starts with dense blocks, or --ranks auto gave blocks different ranks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

from torch import nn

from lorakeet.core.plan import Plan
from lorakeet.models import modules
from lorakeet.models.families import Family
from lorakeet.models.text.model import TextModel
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.stack import PackedStack

NUMBER = "layer_idx"  # the attribute in which transformers' modules keep the number of their block


@dataclass(frozen=True)
class ModelBuilder:
    """Builds the text model of a transformers configuration, with all blocks or only the first ones.

    `key` gives all that the model depends on, by their `repr`.
    """

    make: Callable[[Any], TextModel]
    config: Any
    key: Callable[[], tuple[object, ...]] | None = None

    def __call__(self, blocks: int | None = None) -> TextModel:
        return self.make(self.config if blocks is None else first_blocks_of_config(self.config, blocks))


def count_repeated_blocks(model: nn.Module, family: Family, plan: Plan) -> int:
    """Returns the number of blocks if all are equal and have the same pairs; else 0."""
    prefix, _ = modules.block_prefix(model, family)
    if not modules.blocks_run_once(model, family) or any(extra.path.startswith(f"{prefix}.") for extra in plan.extras):
        return 0
    found = blocks_of(model, family)
    pairs: dict[str, list[Any]] = {f"{prefix}.{index}": [] for index in range(len(found))}
    for entry in plan.entries:
        block = modules.block_of(entry.path, prefix)
        if block in pairs:
            pairs[block].append(replace(entry, path=entry.path.removeprefix(block)))
    first, *others = zip(map(_signature, found), pairs.values(), strict=True)
    return len(found) if all(other == first for other in others) else 0


def last_new_kind_of_block(model: nn.Module, family: Family) -> int:
    """Returns the number of the last block that, without its pairs, equals no earlier one."""
    seen: list[Any] = []
    last = 0
    for number, block in enumerate(blocks_of(model, family)):
        if (signature := _signature(block)) not in seen:
            seen.append(signature)
            last = number
    return last


def run_each_kind(passes: Iterable[object], model: nn.Module, family: Family) -> None:
    """Runs `passes`, one for each block in order, until every kind has run, and one more, which reuses the buffers."""
    for _ in islice(passes, 2 + last_new_kind_of_block(model, family)):
        pass


def blocks_of(model: nn.Module, family: Family) -> list[nn.Module]:
    """Returns the model's decoder blocks in order, without wrappers; empty if it has no list of them."""
    prefix, count = modules.block_prefix(model, family)
    return [modules.unwrapped(cast(nn.Module, modules.find(model, f"{prefix}.{index}"))) for index in range(count)]


def first_blocks_of_config(config: Any, count: int) -> Any:
    """Returns a configuration of the same model with its first `count` blocks."""
    found = copy.deepcopy(config)
    text = found.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # one entry for each block
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return found


def first_blocks_of_plan(plan: Plan, model: nn.Module, family: Family) -> Plan:
    """Returns the part of `plan` for `model`, which has fewer blocks than the model of `plan`."""
    prefix, count = modules.block_prefix(model, family)
    kept = {f"{prefix}.{index}" for index in range(count)}

    def is_there(path: str) -> bool:
        return not path.startswith(f"{prefix}.") or modules.block_of(path, prefix) in kept

    return replace(plan, entries=tuple(entry for entry in plan.entries if is_there(entry.path)))


def _signature(block: nn.Module) -> list[Any]:
    """Returns everything that a block's computation may depend on, but its number."""
    return [part for path, module in modules.original_modules(block) for part in (path, type(module), *_settings(module))]


def _settings(module: nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if isinstance(value, (bool, int, float, str, tuple)) and name != NUMBER:
            yield name, value
    if isinstance(module, (PackedBase, PackedStack)):
        yield json.dumps(module.settings, sort_keys=True, default=str)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, tuple(tensor.shape), tensor.dtype

"""Finds the blocks of a text model below every trained tensor and caches their output for the rows of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakeet.core.plan import Plan
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack_examples
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.spill import Spill
from lorakeet.models import modules
from lorakeet.models.frozen_prefix import FrozenPrefix
from lorakeet.models.text.adapters import as_trained
from lorakeet.models.text.model import TextModel
from lorakeet.quant.int8 import exact_products

SETTING = "train.keep_prefix_states"
TOLERANCE = 64  # in units of the dtype's rounding of the largest state: products of other shapes round differently
_UNFIT = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError)  # from blocks that need more than states


def frozen_depth(text: TextModel, plans: Sequence[Plan] = ()) -> int:
    """Returns how many of the lowest blocks, and what lies before them, contain nothing that is trained.

    With `plans`, whose adapters are not in the model yet, nothing that any of them trains. Raises ConfigError if there is no
    such block, or if the model is streamed or pads its rows.
    """
    if text.streamed is not None or text.attention != "varlen":
        how = "streams its blocks" if text.streamed is not None else f"uses attention {text.attention}"
        raise ConfigError(f"{SETTING} is on, but this run {how}. Leave it off.")
    if not modules.blocks_run_once(text.model, text.family):
        kind = text.model.config.model_type
        raise ConfigError(f"{SETTING} is on, but '{kind}' models do not run their blocks once each and in order. Leave it off.")
    depth, outside = _planned(text, plans) if plans else _in_model(text)
    if depth == 0 or outside:
        what = "something outside the blocks is trained" if outside else "the lowest block is adapted"
        raise ConfigError(f"{SETTING} is on, but {what}. Adapt the top blocks only, with lora.layers top:8, or leave it off.")
    return depth


def _in_model(text: TextModel) -> tuple[int, bool]:
    """Returns how many of the lowest blocks have nothing trained, and whether something outside the blocks and head has."""
    paths = _paths(text)
    trained = [number for number, path in enumerate(paths) if _trained(modules.find(text.model, path))]
    allowed: set[nn.Parameter] = set()
    for part in (*(modules.find(text.model, path) for path in paths), text.model.get_output_embeddings()):
        allowed |= _trained(part)
    outside = _trained(text.model) - allowed | _trained(text.model.get_input_embeddings())
    return min(trained, default=len(paths)), bool(outside)


def _planned(text: TextModel, plans: Sequence[Plan]) -> tuple[int, bool]:
    """Returns the same as `_in_model` once the adapters of `plans` are injected."""
    paths = _paths(text)
    block, _ = modules.block_prefix(text.model, text.family)
    numbers = {path: number for number, path in enumerate(paths)}
    head = modules.path_of(text.model, modules.output_layer(text.model))
    trained, outside = {len(paths)}, False
    adapted = {entry.path for plan in plans for entry in plan.entries} | {extra.path for plan in plans for extra in plan.extras}
    for path in adapted - {head}:
        number = numbers.get(modules.block_of(path, block))
        if number is None:
            outside = True
        else:
            trained.add(number)
    return min(trained), outside


@contextmanager
def cached_states(
    text: TextModel,
    rows: Sequence[Example],
    *,
    folder: Path | None,
    micro_tokens: int,
    plans: Sequence[Plan] = (),
    later: Sequence[Example] = (),
    say: Callable[[str], None] = print,
) -> Iterator[FrozenPrefix]:
    """A context in which passes over `rows` start above the lowest blocks, where neither the model nor `plans` train anything.
    Adapters of `plans` may be injected within the context.

    The states are computed on entry, those of `later` rows by `cache_states`, and kept in memory or in a scratch file in
    `folder`, which is deleted with the process. Rows are computed in order of length, so that the same rows always give the
    same bits: a resumed run computes them again. Products that run in int8 in training are exact here. Raises ConfigError if
    the model cannot be entered there (checked), EnvironmentProblem if the disk is too full.
    """
    depth = frozen_depth(text, plans)
    batches, count = _row_batches(rows, micro_tokens), len(rows) + len(later)
    of_a_token = int(text.model.config.get_text_config().hidden_size) * text.dtype.itemsize
    needed = of_a_token * sum(len(row.ids) for part in _row_batches([*rows, *later], micro_tokens) for row in part)
    if folder is not None and (free := shutil.disk_usage(folder).free) < needed:
        raise EnvironmentProblem(
            f"The hidden states of {count} rows take {needed:,} bytes on the disk of {folder}, and {free:,} are free. "
            f"Free some space, or turn {SETTING} off."
        )
    size = f"{needed:,} bytes" if not later else f"{needed:,} bytes at most"
    say(f"The lowest {depth} blocks train nothing: their output for {count} rows is cached ({size}).")
    prefix = FrozenPrefix(text.model, _paths(text), depth, Spill(folder, f"Free some space, or turn {SETTING} off."))
    try:
        with as_trained(text):
            text.model.eval()
            for number, part in enumerate(batches):
                batch = _add(text, prefix, part)
                if number == 0:
                    _require_same_states(text, batch)
        yield prefix
    finally:
        prefix.close()


def cache_states(text: TextModel, rows: Sequence[Example], *, micro_tokens: int) -> None:
    """Caches the states of those of `rows` that are not cached yet; does nothing outside a `cached_states` context.

    The model may be in eval mode afterwards.
    """
    prefix = text.frozen_prefix
    if prefix is None or prefix.adapted:
        return
    batches = _row_batches([row for row in rows if not prefix.contains(torch.from_numpy(row.ids))], micro_tokens)
    if batches:
        text.model.eval()
    for part in batches:
        _add(text, prefix, part)


def _add(text: TextModel, prefix: FrozenPrefix, rows: Sequence[Example]) -> Batch:
    """Caches the states of `rows`, computed in one batch."""
    batch = pack_examples(rows)
    prefix.add(batch.ids, batch.lengths, _recorded(text, prefix, batch))
    return batch


def _recorded(text: TextModel, prefix: FrozenPrefix, batch: Batch) -> Tensor:
    """Returns the input (tokens, hidden) of the first block above the prefix, every row by itself."""
    try:
        with torch.no_grad(), prefix.recording() as found:
            text.with_options(share_prefix=False, use_cached=False).hidden(batch)
        states = found[-1]
        if states.dim() != 3 or len(states) != 1:
            raise ValueError(f"states of shape {tuple(states.shape)}")
        return states[0, : batch.tokens]
    except _UNFIT as error:
        raise _cannot_be_entered(text, f"{type(error).__name__}: {error}") from error


def _require_same_states(text: TextModel, batch: Batch) -> None:
    """Raises ConfigError unless a pass in training mode that starts from cached states ends as a full one does.

    Both draw from the same seed, so that they differ if a lower block draws random numbers or passes on more than its states.
    """
    found = []
    text.train()
    try:
        for cached in (False, True):
            with torch.random.fork_rng(devices=[]), torch.no_grad(), exact_products(text.model):  # as for cached states
                torch.default_generator.manual_seed(0)
                found.append(text.with_options(use_cached=cached).hidden(batch).float())
    except _UNFIT as error:
        raise _cannot_be_entered(text, f"{type(error).__name__}: {error}") from error
    finally:
        text.model.eval()
    full, cut = found
    difference, allowed = float((full - cut).abs().max()), TOLERANCE * torch.finfo(text.dtype).eps * float(full.abs().max())
    if not difference <= allowed:
        raise _cannot_be_entered(text, f"a pass that starts there differs by {difference:.3g} from a full one")


def _cannot_be_entered(text: TextModel, why: str) -> ConfigError:
    kind = text.model.config.model_type
    return ConfigError(f"{SETTING} is on, but a '{kind}' model cannot be entered between its blocks ({why}). Leave it off.")


def _row_batches(rows: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """The different rows from the shortest to the longest, in batches of at most `micro_tokens` tokens."""
    different = {row.ids.tobytes(): row for row in rows}
    found: list[list[Example]] = []
    left = 0
    for _, row in sorted(different.items(), key=lambda item: (len(item[0]), item[0])):
        if not found or len(row.ids) > left:
            found.append([])
            left = micro_tokens
        found[-1].append(row)
        left -= len(row.ids)
    return found


def _paths(text: TextModel) -> list[str]:
    prefix, count = modules.block_prefix(text.model, text.family)
    return [f"{prefix}.{number}" for number in range(count)]


def _trained(module: nn.Module | None) -> set[nn.Parameter]:
    parameters = () if module is None else module.parameters()
    return {parameter for parameter in parameters if parameter.requires_grad}

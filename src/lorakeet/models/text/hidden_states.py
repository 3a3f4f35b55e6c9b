"""Which blocks of a text model lie below every trained tensor, and the states that they make of all rows of a run."""

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
from lorakeet.memory.spill import Aside
from lorakeet.models import modules
from lorakeet.models.frozen_prefix import FrozenPrefix
from lorakeet.models.text.adapted import as_trained
from lorakeet.models.text.model import TextModel
from lorakeet.quant.int8 import exact_products

SETTING = "train.keep_prefix_states"
ALIKE = 64  # in units of the dtype's rounding, of the largest state: products of other shapes round at other places
_UNFIT = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError)  # of blocks that want more than states


def frozen_depth(text: TextModel, plans: Sequence[Plan] = ()) -> int:
    """How many of the lowest blocks hold nothing that is trained, where nothing else before them does either.

    With `plans`, whose adapters are not in the model yet: nothing that any of them trains. Raises ConfigError where there is
    none, or where the model is streamed or pads its rows.
    """
    if text.streamed is not None or text.attention != "varlen":
        how = "streams its blocks" if text.streamed is not None else f"attends by {text.attention}"
        raise ConfigError(f"{SETTING} is on, but this run {how}. Leave it off.")
    depth, outside = _planned(text, plans) if plans else _in_model(text)
    if depth == 0 or outside:
        what = "something outside the blocks is trained" if outside else "the lowest block is adapted"
        raise ConfigError(f"{SETTING} is on, but {what}. Adapt the top blocks only, with lora.layers top:8, or leave it off.")
    return depth


def _in_model(text: TextModel) -> tuple[int, bool]:
    """How many of the lowest blocks hold nothing trained, and whether anything is trained that is not in or above a block."""
    paths = _paths(text)
    trained = [number for number, path in enumerate(paths) if _trained(modules.find(text.model, path))]
    allowed: set[nn.Parameter] = set()
    for part in (*(modules.find(text.model, path) for path in paths), text.model.get_output_embeddings()):
        allowed |= _trained(part)
    outside = _trained(text.model) - allowed | _trained(text.model.get_input_embeddings())
    return min(trained, default=len(paths)), bool(outside)


def _planned(text: TextModel, plans: Sequence[Plan]) -> tuple[int, bool]:
    """As `_in_model`, once the adapters of `plans` are there."""
    paths = _paths(text)
    block, _ = modules.block_prefix(text.model, text.family)
    numbers = {path: number for number, path in enumerate(paths)}
    head = modules.path_of(text.model, modules.output_layer(text.model))
    trained, outside = {len(paths)}, False
    places = {entry.path for plan in plans for entry in plan.entries} | {extra.path for plan in plans for extra in plan.extras}
    for place in places - {head}:
        number = numbers.get(modules.block_of(place, block))
        if number is None:
            outside = True
        else:
            trained.add(number)
    return min(trained), outside


@contextmanager
def prefix_states(
    text: TextModel,
    rows: Sequence[Example],
    *,
    folder: Path | None,
    micro_tokens: int,
    plans: Sequence[Plan] = (),
    later: Sequence[Example] = (),
    say: Callable[[str], None] = print,
) -> Iterator[FrozenPrefix]:
    """A context in which passes over `rows` begin above the lowest blocks, which hold nothing that is trained: nor will any of
    the adapters of `plans`, where these come into the model within the context.

    Their states are computed at its beginning, those of rows that come `later` by `keep_states`, and kept in a scratch file in
    `folder`, which vanishes with the process, or in memory. Rows pass in an order of their own, by length, so that the same rows
    always give the same bits: a resumed run computes them again. Products that run in int8 in training are exact here. Raises
    ConfigError where the model cannot be cut there (it is tried), EnvironmentProblem where the disk has no room.
    """
    depth = frozen_depth(text, plans)
    parts, count = _parts(rows, micro_tokens), len(rows) + len(later)
    needed = _state_bytes(text) * sum(len(row.ids) for part in _parts([*rows, *later], micro_tokens) for row in part)
    if folder is not None and (free := shutil.disk_usage(folder).free) < needed:
        raise EnvironmentProblem(
            f"The states of {count} rows take {needed:,} bytes on the disk of {folder}, and {free:,} are free. "
            f"Free some space, or turn {SETTING} off."
        )
    size = f"{needed:,} bytes" if not later else f"{needed:,} bytes at most"
    say(f"The lowest {depth} blocks hold nothing that is trained: what they make of {count} rows is kept ({size}).")
    prefix = FrozenPrefix(text.model, _paths(text), depth, Aside(folder, f"Free some space, or turn {SETTING} off."))
    try:
        with as_trained(text):
            text.model.eval()
            for number, part in enumerate(parts):
                batch = _kept(text, prefix, part)
                if number == 0:
                    _require_alike(text, prefix, batch)
        text.prefix = prefix
        yield prefix
    finally:
        text.prefix = None
        prefix.close()


def keep_states(text: TextModel, rows: Sequence[Example], *, micro_tokens: int) -> None:
    """Keeps what the lowest blocks make of those of `rows` that are not kept yet, in the context of a `prefix_states` only. The
    model may be in eval mode afterwards."""
    prefix = text.prefix
    if prefix is None or prefix.adapted:
        return
    parts = _parts([row for row in rows if not prefix.holds(torch.from_numpy(row.ids))], micro_tokens)
    if parts:
        text.model.eval()
    for part in parts:
        _kept(text, prefix, part)


def _kept(text: TextModel, prefix: FrozenPrefix, rows: Sequence[Example]) -> Batch:
    """Keeps the states of `rows`, which pass through the lowest blocks at once."""
    batch = pack_examples(rows)
    prefix.keep(batch.ids, batch.lengths, _recorded(text, prefix, batch))
    return batch


def _recorded(text: TextModel, prefix: FrozenPrefix, batch: Batch) -> Tensor:
    """The input (tokens, hidden) of the first block above, every row by itself."""
    shares, text.shares_prefix = text.shares_prefix, False
    try:
        with torch.no_grad(), prefix.recording() as found:
            text.hidden(batch)
        states = found[-1]
        if states.dim() != 3 or len(states) != 1:
            raise ValueError(f"states of shape {tuple(states.shape)}")
        return states[0, : batch.tokens]
    except _UNFIT as error:
        raise _cannot_be_cut(text, f"{type(error).__name__}: {error}") from error
    finally:
        text.shares_prefix = shares


def _require_alike(text: TextModel, prefix: FrozenPrefix, batch: Batch) -> None:
    """Raises ConfigError unless a pass in training mode that begins with kept states ends as a whole one does.

    Both draw from the same seed, so that they differ where a block below draws random numbers, or hands on more than its states.
    """
    found = []
    text.learn()
    try:
        for kept in (None, prefix):
            text.prefix = kept
            with torch.random.fork_rng(devices=[]), torch.no_grad(), exact_products(text.model):  # as kept states are
                torch.default_generator.manual_seed(0)
                found.append(text.hidden(batch).float())
    except _UNFIT as error:
        raise _cannot_be_cut(text, f"{type(error).__name__}: {error}") from error
    finally:
        text.prefix = None
        text.model.eval()
    whole, cut = found
    off, allowed = float((whole - cut).abs().max()), ALIKE * torch.finfo(text.dtype).eps * float(whole.abs().max())
    if not off <= allowed:
        raise _cannot_be_cut(text, f"a pass that begins there differs by {off:.3g} from a whole one")


def _cannot_be_cut(text: TextModel, why: str) -> ConfigError:
    kind = text.model.config.model_type
    return ConfigError(f"{SETTING} is on, but a '{kind}' model cannot be entered between its blocks ({why}). Leave it off.")


def _parts(rows: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """The different rows from the shortest to the longest, cut into parts of at most `micro_tokens` tokens."""
    different = {row.ids.tobytes(): row for row in rows}
    found: list[list[Example]] = []
    room = 0
    for _, row in sorted(different.items(), key=lambda item: (len(item[0]), item[0])):
        if not found or len(row.ids) > room:
            found.append([])
            room = micro_tokens
        found[-1].append(row)
        room -= len(row.ids)
    return found


def _paths(text: TextModel) -> list[str]:
    prefix, count = modules.block_prefix(text.model, text.family)
    return [f"{prefix}.{number}" for number in range(count)]


def _state_bytes(text: TextModel) -> int:
    """Bytes of one token's states."""
    return int(text.model.config.get_text_config().hidden_size) * text.dtype.itemsize


def _trained(module: nn.Module | None) -> set[nn.Parameter]:
    parameters = () if module is None else module.parameters()
    return {parameter for parameter in parameters if parameter.requires_grad}

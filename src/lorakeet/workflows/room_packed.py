"""How much memory a merge into a quantised model takes, and whether a budget has room for it.

    measure    the base as the run had it, packed where it was, computes with the adapter and without
    round      beside it one block in fp32, what the rounding of its largest layer holds, and the rows' states
    finish     the numbers before rounding, the same without the pairs, their scales and the rounded ones: three and a half times
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import larger_than_machine
from lorakeet.models.alike_blocks import Build
from lorakeet.models.families import family_of
from lorakeet.models.fits import plan_of
from lorakeet.models.load import read_config
from lorakeet.models.modules import block_prefix
from lorakeet.models.outline import outline
from lorakeet.models.source import find_source
from lorakeet.models.streamed_load import empty_model
from lorakeet.train.rehearsal import JUDGE, Judging, NotPlanned, rehearse_judging
from lorakeet.workflows.forecast_run import INTERVALS, TOKENIZER_ENTRY, Precision, filled, runtime_bytes
from lorakeet.workflows.opened import Opened

FP32 = 4  # bytes
LAYER = 12  # of a layer in fp32: W, and on each of two grids its scales, its columns as they were, their errors and values
HESSIAN = 6  # of (in, in) in fp32: H, H in order twice, its factor, the inverse and that one's factor
FINISH = 3.5  # of the layers in fp32: before rounding, the same without the pairs, scales, and the rounded numbers


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model's linear layers: of all, of the largest block, of the largest one; and the most inputs of one."""

    layers: int
    block: int
    largest: int
    widest: int


def require_room(opened: Opened, *, rows: int, finish: bool, micro_tokens: int, console: Console) -> None:
    """Raises ConfigError where the run's memory.budget has no room for a merge that calibrates on `rows` rows."""
    budget = opened.config.memory.bytes
    if budget is None:
        return
    say = partial(console.print, markup=False, soft_wrap=True)
    if warning := larger_than_machine(budget):
        say(warning)
    return_freed_memory()
    what = "a merge into packed weights"
    try:
        needed = _needed(opened, rows, finish, micro_tokens, console)
    except NotPlanned as error:
        say(str(error))
        opened.require_room(1 + (FINISH if finish else 0), what, console)
        return
    if needed > budget:
        less = " Without --finish-steps it takes less." if finish else " Fewer --calibration-rows take less."
        raise ConfigError(
            f"The budget is {bytes_text(budget)}, but {what} takes about {bytes_text(needed)}: the base as the run had it, and "
            f"{'its layers in fp32' if finish else 'one block in fp32'}.{less} Give that much with --memory, or do it on a "
            "larger machine."
        )
    say(f"Memory: {bytes_text(needed)} planned of {bytes_text(budget)} for {what}.")


def _needed(opened: Opened, rows: int, finish: bool, micro_tokens: int, console: Console) -> int:
    spec = opened.config.model
    source = find_source(spec, partial(console.print, markup=False, soft_wrap=True))
    config = read_config(source)
    text, empty = config.get_text_config(), empty_model(config, torch.float32)
    make = partial(
        outline, name=spec.path, dtype=torch.float32, products=torch.float32, attention=spec.attention,
        quantize=spec.quantize, files=source,
    )  # fmt: skip
    longest = opened.config.data.max_tokens
    judging = Judging(filled(longest, max(longest, micro_tokens)), 0, 0)
    ids = next((found.ids for found in opened.adapter.token_rows.values()), ())
    found = rehearse_judging(Build(make, config), plan_of(empty, opened.adapter), judging, token_ids=ids)
    sizes = sizes_of(empty)
    states = FP32 * 2 * rows * longest * int(text.hidden_size)
    scratch = FP32 * (sizes.block + LAYER * sizes.largest + HESSIAN * sizes.widest**2) + states
    finishing = int(FINISH * FP32 * sizes.layers) if finish else 0
    beside = runtime_bytes(Precision(torch.float32, torch.float32, spec.quantize)) + TOKENIZER_ENTRY * int(text.vocab_size)
    return beside + max(found.peaks[JUDGE].bytes + INTERVALS + finishing, found.base + scratch + finishing)


def sizes_of(model: torch.nn.Module) -> Sizes:
    """The sizes of the linear layers within the blocks of a model, which may have shapes alone."""
    prefix, count = block_prefix(model, family_of(model.config.get_text_config()))  # type: ignore[union-attr, operator]
    shapes = [
        [tuple(parameter.shape) for parameter in model.get_submodule(f"{prefix}.{index}").parameters() if parameter.dim() == 2]
        for index in range(count)
    ]
    blocks = [sum(map(math.prod, block)) for block in shapes]
    every = [shape for block in shapes for shape in block]
    return Sizes(sum(blocks), max(blocks, default=0), max(map(math.prod, every), default=0), max(map(max, every), default=0))

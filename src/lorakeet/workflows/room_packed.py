"""How much memory a merge into a quantised model takes, and whether a budget has room for it.

    measure    the base as the run had it, packed where it was, computes with the adapter and without
    round      beside it one block in fp32, what the rounding of its largest layer holds, and the rows' states: rehearsed
    finish     the numbers before rounding, the same without the pairs, their scales and the rounded ones: three and a half times
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from rich.console import Console
from torch import Tensor, nn

from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import larger_than_machine
from lorakeet.merge.requantise import BYTES_OF_ROUNDING
from lorakeet.models.adapt import begin_adapter
from lorakeet.models.alike_blocks import Build, pass_first_of_each_kind
from lorakeet.models.families import family_of
from lorakeet.models.fits import plan_of
from lorakeet.models.folded import fold_layers
from lorakeet.models.fuse import unfuse
from lorakeet.models.gptq_blocks import pack_blocks
from lorakeet.models.load import read_config
from lorakeet.models.modules import block_prefix, find, original_modules
from lorakeet.models.outline import OutlinedBase, outline
from lorakeet.models.quantized import packable
from lorakeet.models.source import find_source
from lorakeet.models.streamed_load import empty_model
from lorakeet.models.text import TextModel
from lorakeet.quant.adopt import empty_base
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.train.rehearsal import JUDGE, Judging, NotPlanned, Rows, made_up_rows, on_shapes, rehearse_judging
from lorakeet.workflows.forecast_run import INTERVALS, TOKENIZER_ENTRY, Precision, filled, runtime_bytes
from lorakeet.workflows.opened import NAME, Opened

FP32 = 4  # bytes
FINISH = 3.5  # of the layers in fp32: before rounding, the same without the pairs, scales, and the rounded numbers
ROUND = "round"
ENOUGH_ROWS = 64  # that are rehearsed, the default; of more the states alone count
ANGLES = 512  # numbers of a token that go into blocks beside its state: cosines and sines of a head's width, at most 256 each
LIKE = {"block_size": 64, "double_quant": True}  # of a layer that the base has dense, and the result in NF4 or alike


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
    plan = plan_of(empty, opened.adapter)
    found = rehearse_judging(Build(make, config), plan, judging, token_ids=ids)
    few = min(rows, ENOUGH_ROWS)
    waiting = FP32 * (rows - few) * longest * (int(text.hidden_size) + ANGLES)
    rounding = rehearse_rounding(partial(make, config), plan, Rows(longest, few)) + waiting
    finishing = int(FINISH * FP32 * layer_numbers(empty)) if finish else 0
    beside = runtime_bytes(Precision(torch.float32, torch.float32, spec.quantize)) + TOKENIZER_ENTRY * int(text.vocab_size)
    return beside + max(found.peaks[JUDGE].bytes + INTERVALS, rounding) + finishing


def rehearse_rounding(build: Callable[[], TextModel], plan: Plan, rows: Rows) -> int:
    """The most bytes of tensors that are held while the first blocks of each kind are folded and rounded on calibration rows."""
    with on_shapes() as ledger:
        text = build()
        begin_adapter(text, plan, seed=0)
        unfuse(text.model)
        modules = original_modules(text.model)
        packing = {path: module.base.settings for path, module in modules if isinstance(module, PackedLinear)}
        paths = list(packing) or list(packable(text.model, head=False))

        def layers_of(block: str) -> dict[str, nn.Module]:
            own = [path for path in paths if path.startswith(f"{block}.")]
            fold_layers(text.model, NAME, own)
            return {path: cast(nn.Module, find(text.model, path)) for path in own}

        def pack(path: str, weight: Tensor, *_: object) -> PackedBase:
            torch.empty(BYTES_OF_ROUNDING * weight.numel(), dtype=torch.uint8)
            return OutlinedBase(empty_base(packing.get(path, {"method": "nf4", "shape": tuple(weight.shape), **LIKE})))

        with ledger.phase(ROUND):
            blocks = pack_blocks(text, made_up_rows(rows), pack, layers_of, keep=True)
            pass_first_of_each_kind(blocks, text.model, text.family)
        ledger.close()
        return ledger.peaks[ROUND].bytes


def layer_numbers(model: nn.Module) -> int:
    """Numbers of the linear layers within the blocks of a model, which may have shapes alone."""
    prefix, count = block_prefix(model, family_of(model.config.get_text_config()))  # type: ignore[union-attr, operator]
    inside = [model.get_submodule(f"{prefix}.{index}") for index in range(count)]
    return sum(parameter.numel() for block in inside for parameter in block.parameters() if parameter.dim() == 2)

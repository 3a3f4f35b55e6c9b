"""How evaluating or compressing a finished adapter fits into memory.budget.

Planned is what is really in use: the base as it is loaded, the adapter as it was read and again on the model, rows and texts as
the evaluation takes them, and for `compress` a backward pass over the pairs and every cut beside it. No step, no moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.kernels.device import standing_for
from lorakeet.memory.cuda import allocated_bytes, enforcing_gpu_budget, phases_on_gpu
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.free import free_memory
from lorakeet.memory.usage import Usage, add_usage, larger_usage
from lorakeet.models.files.source import find_source
from lorakeet.models.fits import plan_of
from lorakeet.models.placement import device_for
from lorakeet.models.streaming.load import empty_model
from lorakeet.models.text.load import read_config
from lorakeet.models.text.model import TextModel
from lorakeet.planning.fit import BudgetedWork, Say, fit_budget, fit_free
from lorakeet.planning.forecast_text_run import (
    INTERVALS,
    LOAD,
    ROW_BYTES,
    TOKENIZER_ENTRY,
    VALUE,
    Workload,
    evaluation_of,
    load_peak,
    text_runtime_bytes,
)
from lorakeet.planning.planned_model import builder_of
from lorakeet.planning.reference import evaluated_copies
from lorakeet.planning.rehearse_text import BEGIN, FINAL, STEP, Weigh, rehearse_evaluation
from lorakeet.planning.text_run import precision_of, tiles_of_head
from lorakeet.runs.open_adapter import Opened
from lorakeet.runs.residency import ALONE, RESIDENT, STREAMED_WAYS, MemoryPlan, Residency, Way, peak_said


def fit_evaluation(
    config: RunConfig, adapter: Adapter, say: Say, workload: Workload, weigh: Weigh | None = None, copies: float = 1.0, *,
    what: str = "",
) -> Residency[MemoryPlan]:  # fmt: skip
    """How an evaluation of `adapter`, or a compression (`weigh`, `copies`), keeps memory.budget, or without one fits into what is
    free on a CUDA device. `what` names the work in messages, if it is another. Raises as `fit_budget`."""
    work = Evaluation(config, adapter, say, workload, weigh, copies)
    work.what = what or work.what
    if not config.memory.limit and work.device.type == "cuda":
        return fit_free(work, free_memory(work.device), say)
    return fit_budget(work, config.memory.limit, say)


@contextmanager
def model_to_measure(
    opened: Opened, console: Console, workload: Workload, weigh: Weigh | None = None, copies: float = 1.0
) -> Iterator[tuple[TextModel, Residency[MemoryPlan]]]:
    """A context with the model and its adapter, as they keep the budget (`fit_evaluation`); at its end the peak is printed."""
    say = partial(console.print, markup=False, soft_wrap=True)
    residency = fit_evaluation(opened.config, opened.adapter, say, workload, weigh, copies)
    with enforcing_gpu_budget(residency.budget, "Raise it with --memory."), peak_said(residency, console):
        yield replace(opened, residency=residency).text_model(console), residency


class Evaluation(BudgetedWork[MemoryPlan]):
    """An adapter on its base, evaluated on rows.

    For `compress`, `weigh` is its backward pass over a base in memory, and `copies` what is in memory of the adapter and its cuts
    beside the one on the model.
    """

    def __init__(
        self, config: RunConfig, adapter: Adapter, say: Say, workload: Workload, weigh: Weigh | None, copies: float
    ) -> None:
        self.what = "measuring this adapter" if weigh is None else "compressing this adapter"
        self.config, self.adapter, self.say, self.workload = config, adapter, say, workload
        self.weigh, self.copies = weigh, copies
        self.spec, self.keep, self.named_store = config.model, config.memory.keep, config.memory.store
        self.device = device_for(config.model.device)

    @cached_property
    def model(self) -> tuple[Any, Path]:
        """The configuration of the base, and its files."""
        source = find_source(self.spec, self.say)
        return read_config(source), source

    def ways(self, budget: int) -> Iterator[Way]:
        yield RESIDENT
        if self.weigh is None:
            yield from STREAMED_WAYS

    def plan(self, way: Way) -> MemoryPlan:
        config, precision, (model_config, source) = self.config, precision_of(self.config), self.model
        pairs = plan_of(empty_model(model_config, torch.float32), self.adapter)
        build = builder_of(self.spec, way, model_config, precision, source)
        with standing_for(precision.device):
            size = evaluation_of(config, answered=not self.workload.labelled, model_config=model_config)
            found = rehearse_evaluation(build, pairs, size, token_ids=self.adapter.token_ids, weigh=self.weigh)
        own = VALUE * pairs.parameters
        kept = add_usage(Usage(), base=found.base, adapter=own)
        floors = self.workload.floors(config, on_gpu=precision.on_gpu)
        read = round(self.copies * own)  # as values; a GPU has none of them, but the cut that is measured
        cut = own if precision.on_gpu and self.weigh is not None else 0
        more = cut + evaluated_copies(config, own, on_gpu=precision.on_gpu)
        intervals = 0 if precision.on_gpu else INTERVALS
        held = {
            LOAD: load_peak(model_config, found, precision),
            BEGIN: found.peaks[BEGIN],
            STEP: found.peaks.get(STEP, Usage()),
            FINAL: add_usage(larger_usage(found.peaks[FINAL], add_usage(kept, scratch=intervals)), adapter=more, runtime=floors),
        }
        block_bytes = found.block_bytes
        if precision.on_gpu:
            phases = phases_on_gpu(held, text_runtime_bytes(precision))
            block_bytes = allocated_bytes(block_bytes) if found.blocks else 0
        else:
            words = TOKENIZER_ENTRY * int(model_config.get_text_config().vocab_size) + ROW_BYTES * self.workload.characters
            held = {name: add_usage(peak, adapter=read) for name, peak in held.items()}
            phases = phases_of(held, text_runtime_bytes(precision, decomposing=self.weigh is not None) + words, returning=True)
        growing = () if way.slots == ALONE else None  # two blocks did not fit
        return MemoryPlan(Forecast(phases), blocks=found.blocks, block_bytes=block_bytes, growing=growing)

    def head_tiles(self, way: Way) -> tuple[int, int]:
        return tiles_of_head(self.config, self.model[0])

    def advice(self) -> str:
        if self.weigh is None:
            return (
                "Give that with --memory, or lower train.micro_tokens, data.max_tokens (longer rows are left out) or "
                "evaluate.drift_tokens in its run file."
            )
        return (
            "Its pairs are weighed by a backward pass over a base in memory, which is not streamed. Give that with --memory, or "
            "lower train.micro_tokens or data.max_tokens (longer rows are left out) in its run file."
        )

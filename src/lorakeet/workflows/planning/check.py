"""How the check of a merged or exported model fits into a memory budget: its models whole in fp32, or streamed.

A check compares what base + adapter compute with what the artefact computes. Its phases, each with a peak of its own:

    load       a model is read, or goes block by block into its store
    weights    every stored tensor against the one it should be
    ask        if models are streamed: llama.cpp computes, and its outputs wait on disk
    compare    both compute; streamed models one after the other, the outputs of the first or the batches waiting on disk
    intervals  of what was found, once no model computes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lorakeet.core.plan import Plan
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.models.families import family_of
from lorakeet.models.files.source import find_source
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.fits import plan_of
from lorakeet.models.generate.sample import spilled_bytes
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import bytes_of_storing, empty_model
from lorakeet.models.text.from_config import model_from_config, streamed_model_from_config
from lorakeet.models.text.load import read_config
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.workflows.planning.check_sizes import (
    FEWEST_TOKENS,
    FP32,
    GREEDY_TOKENS,
    CheckSize,
    adapted_bytes,
    logits_bytes,
    tensor_peak,
)
from lorakeet.workflows.planning.fit import BudgetedWork, fit_budget
from lorakeet.workflows.planning.forecast_text_run import INTERVALS, TOKENIZER_ENTRY, Precision, text_runtime_bytes
from lorakeet.workflows.planning.rehearse_text import FINAL, Rehearsal, rehearse_evaluation
from lorakeet.workflows.runs.open_adapter import Opened
from lorakeet.workflows.runs.residency import ALONE, FEWEST, RESIDENT, MemoryPlan, Way

COPIES = 4  # of a matrix in fp32: as it is, its change, their sum, and one as it was stored or is compared


def fit_check(
    opened: Opened, size_of: CheckSize | Callable[[int | None], CheckSize], out: Path, console: Console
) -> Opened:
    """`opened` with how its models keep its budget in a check; as it was without a budget. Raises as `fit_budget`.

    With a function, which gives the size of the check of each row's first tokens (None: all), rows are cut if longer ones do not
    fit: keys and values of 2,048 tokens of Llama-2-7B take 2 GiB in fp32, in llama.cpp at once. The folder of the stores is
    beside `out` unless memory.store names one (runs/residency.temporary_stores).
    """
    budget = opened.config.memory.limit
    if not budget:
        return opened
    opened = opened.over(replace(opened.config.model, device="cpu", kernels="torch"))  # the budget bounds the process
    sizes = (lambda _: size_of) if isinstance(size_of, CheckSize) else size_of
    cut = opened.run is not None and not isinstance(size_of, CheckSize)
    say = partial(console.print, markup=False, soft_wrap=True)
    check = ModelCheck.of(sizes, opened, out, say, cut=cut)
    return replace(opened, residency=fit_budget(check, budget, say))


class ModelCheck(BudgetedWork[MemoryPlan]):
    """A check of a model with pairs as in `pairs`; `ids` are those of trained token rows, `model` its configuration and files."""

    out: Path

    def __init__(
        self,
        sizes: Callable[[int | None], CheckSize],
        spec: ModelSpec,
        model: Callable[[], tuple[Any, Path | None]],
        pairs: Callable[[nn.Module], Plan],
        *,
        ids: tuple[int, ...] = (),
        cut: bool = False,
    ) -> None:
        self.sizes, self.spec, self.cut, self.ids = cache(sizes), spec, cut, ids
        self._model, self._pairs = model, pairs

    @classmethod
    def of(
        cls, sizes: Callable[[int | None], CheckSize], opened: Opened, out: Path, say: Callable[[str], None], *, cut: bool = False
    ) -> ModelCheck:
        """The check of a finished adapter."""
        adapter, spec = opened.adapter, opened.config.model

        def model() -> tuple[Any, Path]:
            source = find_source(spec, say)
            return read_config(source), source

        check = cls(sizes, spec, model, lambda empty: plan_of(empty, adapter), ids=adapter.token_ids, cut=cut)
        check.out, check.named_store = out, opened.config.memory.store
        check.what = sizes(None).what
        check.remedy = "Free some space, or name a folder on another disk with memory.store in the run's config.yaml."
        return check

    @cached_property
    def model(self) -> tuple[Any, Path | None]:
        """The configuration of the model, and its files if they are here."""
        return self._model()

    @cached_property
    def empty(self) -> nn.Module:
        """The model without numbers."""
        found: nn.Module = empty_model(self.model[0], torch.float32)
        return found

    @cached_property
    def pairs(self) -> Plan:
        """The adapter's pairs."""
        return self._pairs(self.empty)

    @cached_property
    def weights(self) -> int:
        """Numbers in the model."""
        return sum(parameter.numel() for parameter in self.empty.parameters())

    @cached_property
    def runtime(self) -> int:
        """Bytes of the process beside the tensors."""
        return text_runtime_bytes(Precision(torch.float32, torch.float32, self.spec.quantize))

    def ways(self, budget: int) -> Iterator[Way]:
        """In memory, with two blocks of each model, with one; then the same of rows cut in half, again and again."""
        longest: int | None = None
        while True:
            size = self.sizes(longest)
            length = size.evaluation.rows.length - GREEDY_TOKENS
            shortest = not self.cut or length <= FEWEST_TOKENS
            if shortest or self.runtime + size.beside <= budget:  # else llama.cpp alone takes more
                for way in (RESIDENT, Way(streamed=True, slots=FEWEST), Way(streamed=True, slots=ALONE)):
                    yield replace(way, longest=longest)
            if shortest:
                return
            longest = max(FEWEST_TOKENS, length // 2)

    def plan(self, way: Way) -> MemoryPlan:
        runtime = self.runtime  # measured before the rehearsal, which leaves some memory behind
        size, (config, source) = self.sizes(way.longest), self.model
        make = partial(
            partial(streamed_model_from_config, slots=way.slots) if way.streamed else model_from_config, name=self.spec.path,
            dtype=torch.float32, products=torch.float32, attention=self.spec.attention, quantize=self.spec.quantize,
            files=source,
        )  # fmt: skip
        found = rehearse_evaluation(ModelBuilder(make, config), self.pairs, size.evaluation, token_ids=self.ids)
        there = way.slots * found.block_bytes
        own = (found.base - there) * size.models  # what models have in memory all along: all of it, if they are not streamed
        text, adapter = config.get_text_config(), FP32 * self.pairs.parameters
        held = {
            "load": add_usage(Usage(), base=own, adapter=adapter, scratch=self._reading(found)),
            "weights": add_usage(Usage(), base=own, adapter=adapter, scratch=self._comparing(found, size)),
            "ask": add_usage(Usage(), base=own, adapter=adapter, runtime=size.beside),
            "compare": add_usage(
                found.peaks[FINAL], base=own + there - found.base, runtime=0 if way.streamed else size.beside,
                logits=logits_bytes(size.row, int(text.vocab_size)),
            ),
            "intervals": add_usage(Usage(), base=own + there, adapter=adapter, scratch=INTERVALS),
            "write": add_usage(Usage(), scratch=size.writing),
        }  # fmt: skip
        words = TOKENIZER_ENTRY * int(text.vocab_size) * size.models
        phases = phases_of(held, runtime + words, returning=True)
        growing = () if way.slots == ALONE else None  # two blocks did not fit
        return MemoryPlan(Forecast(phases), blocks=found.blocks, block_bytes=found.block_bytes, growing=growing)

    def words(self, way: Way, plan: MemoryPlan) -> str:
        mapped = "; the pages of the file that llama.cpp maps are not counted" if self.sizes(way.longest).beside else ""
        return super().words(way, plan) + mapped

    def disk(self, way: Way, plan: MemoryPlan) -> Mapping[Path, int]:
        size = self.sizes(way.longest)
        stored = FP32 * self.weights * (size.models + size.more_stores)
        return {self.folder: stored + size.waiting + self.spilled(size, plan.blocks), self.out: size.artefact}

    def spilled(self, size: CheckSize, blocks: int) -> int:
        """Bytes on disk of the keys and values of a text that a streamed model writes, of which one at a time may be there."""
        evaluation = size.evaluation
        longest = max(evaluation.text_tokens + 1, evaluation.rows.length)
        return spilled_bytes(self.model[0].get_text_config(), longest, blocks) if evaluation.texts else 0

    def _comparing(self, found: Rehearsal, size: CheckSize) -> int:
        """Bytes beside what is in memory all along, while weights are compared: blocks have left, llama.cpp has not started."""
        changed = adapted_bytes(self.pairs, found.largest)
        return tensor_peak(changed, found.largest) if size.tensors else COPIES * changed

    def _reading(self, found: Rehearsal) -> int:
        """Bytes beside the models while one is read: a block on its way into the store, or tensors in a file's other dtype."""
        stored = stored_dtype(self.model[0])
        if found.blocks:
            family = family_of(self.model[0].get_text_config())
            return bytes_of_storing(self.empty, family, found.block_bytes, stored.itemsize + FP32)
        return found.being_cast(stored, torch.float32)

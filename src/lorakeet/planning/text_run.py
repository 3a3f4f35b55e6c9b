"""How a text run fits into memory.budget: its weights in memory, or its frozen blocks streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.core.tiled_product import TILE
from lorakeet.memory.remembered import remembered
from lorakeet.models.files.source import find_source
from lorakeet.models.placement import device_for, planned_on, products_for, text_dtype_for
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.models.text.load import read_config
from lorakeet.planning.attention_choice import first_attention
from lorakeet.planning.fit import BudgetedWork, keeps_in_host, way_text
from lorakeet.planning.forecast_text_run import (
    ROW_BYTES,
    RowLengths,
    TextRunPlan,
    Workload,
    decomposes,
    forecast_run,
    largest_rows,
    measures_rows,
    text_runtime_bytes,
    window_of,
)
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import STEP, RowShape
from lorakeet.runs.residency import FEWEST, RESIDENT, MemoryPlan, Way, with_more

STATES_ON_THE_WAY = 3  # of a micro-batch, about: a block's input, its output, and what else the decoder hands to it
MOST_TOGETHER = 4  # micro-batches: each adds some 5 s to the rehearsal of 32 blocks
LEAST = Way(streamed=True, together=1, spilled=True)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step: how many, and the bytes of one's hidden states."""

    count: int
    state_bytes: int
    ends_bytes: int = 0  # of the embedding and the head, where these may stay in memory
    head_read: int = 0  # bytes of the head that the loss of those that go together reads, where it does not


def streaming_ways(plan: Callable[[Way], MemoryPlan], batches: Batches, budget: int) -> Iterator[Way]:
    """Ways that seem to fit into `budget`, the one that moves the fewest bytes first; at the end the way that takes least.

    They are ordered by an estimate from two rehearsals (`plan`) of one micro-batch at a time.
    """
    found = sorted(_estimated(plan, batches, budget), key=lambda one: one[:2])
    yield from (way for _, _, way in found)
    yield LEAST


def bytes_moved(way: Way, plan: MemoryPlan, batches: Batches) -> int:
    """Bytes read from and written to the disk in a step.

    A pass of `together` micro-batches goes forth and back through n blocks, of which s are in memory; the record used longest ago
    is replaced (memory/stream). So a step of b micro-batches moves

        blocks     ⌈b / together⌉ · 2·(n − s) · bytes of a block       nothing if all blocks are in memory
        inputs     b · 2·n · bytes of a state                          if the inputs of blocks are on disk
        head       ⌈b / together⌉ · bytes of it                       if it is not in memory

    or less, if the lowest blocks train nothing.
    """
    passes = math.ceil(batches.count / way.together)
    blocks = passes * 2 * (plan.blocks - way.slots) * plan.block_bytes
    inputs = batches.count * 2 * plan.blocks * batches.state_bytes if way.spilled else 0
    return blocks + inputs + (0 if way.ends else passes * batches.head_read)


def _estimated(plan: Callable[[Way], MemoryPlan], batches: Batches, budget: int) -> Iterator[tuple[int, int, Way]]:
    """Bytes moved, peak and way, of those that seem to fit; inputs are spilled only if something moves with all in memory."""
    for spilled, ends in product((False, True), (True, False) if batches.ends_bytes else (False,)):
        one = plan(Way(True, together=1, spilled=spilled))
        states = STATES_ON_THE_WAY + (0 if spilled else one.blocks)
        for together in range(1, min(batches.count, MOST_TOGETHER) + 1):
            way = Way(True, together=together, spilled=spilled, ends=ends)
            estimate = with_more(one, (together - 1) * batches.state_bytes * states, "saved activations", (STEP,))
            estimate = with_more(estimate, batches.ends_bytes if ends else 0, "base", None)
            if estimate.peak > budget:
                continue
            slots = min(one.blocks, FEWEST + estimate.more_blocks(budget))
            moved = bytes_moved(replace(way, slots=slots), one, batches)
            yield moved, estimate.peak + (slots - min(FEWEST, one.blocks)) * one.block_bytes, way
            if not moved:
                return


class TextRun(BudgetedWork[TextRunPlan]):
    """A run, or a search, whose model is read from `files` if given: what `lorakeet plan` knows of a model that is not here."""

    option = "memory.budget"

    def __init__(
        self, config: RunConfig, workload: Workload, say: Callable[[str], None], model: tuple[Any, Path | None] | None = None
    ) -> None:
        self.config = replace(config, lora=workload.lora) if workload.lora is not None else config
        self.workload, self.say, self.given = workload, say, model
        self.spec, self.keep, self.named_store = config.model, config.memory.keep, config.memory.store
        self.device = device_for(config.model.device) if model is None else planned_on(config.model.device)
        self.what = "this run" if workload.members == 1 else "this search"
        self._plans: dict[Way, TextRunPlan] = {}
        self._runtimes: dict[bool, int] = {}

    @cached_property
    def model(self) -> tuple[Any, Path | None]:
        """The model's configuration, and its files if they are here."""
        source = find_source(self.spec, self.say) if self.given is None else None
        return self.given or (read_config(source), source)  # type: ignore[arg-type]

    @cached_property
    def lengths(self) -> RowLengths | None:
        """Those of the rows, encoded now; None where they are not known."""
        return None if self.workload.lengths is None else self.workload.lengths()

    @property
    def rows(self) -> RowShape:
        """The largest micro-batch of a step."""
        return self._rows_of(self.config)

    def _rows_of(self, config: RunConfig) -> RowShape:
        """As `rows`, with other settings; with the padding of the attention that the plan begins with."""
        config = config.changed(model={"attention": first_attention(config, self.model[0])})
        return largest_rows(config, self.lengths, window_of(self.model[0]))

    def runtime(self, *, streamed: bool) -> int:
        """Bytes of the process beside the tensors, measured when the first plan of that kind is made: planning itself leaves some
        behind. Rows that are encoded are among them. On a CUDA device rows do not count.
        """
        if streamed not in self._runtimes:
            precision = precision_of(self.config)
            absent = self.lengths is None or self.workload.absent
            rows = ROW_BYTES * self.workload.characters if absent and not precision.on_gpu else 0
            decomposing = decomposes(self.config)
            measured = partial(text_runtime_bytes, precision, decomposing=decomposing)
            found = remembered(lambda: ("runtime", precision, decomposing, streamed), measured) if absent else measured()
            self._runtimes[streamed] = found + rows
        return self._runtimes[streamed]

    @cached_property
    def batches(self) -> Batches:
        """The largest micro-batch of a step, and how many a step has at most."""
        return self.batches_of(None)

    def batches_of(self, micro_tokens: int | None) -> Batches:
        """The same with another train.micro_tokens, if one is given."""
        config, text = self.with_tokens(micro_tokens), self.model[0].get_text_config()
        rows = self._rows_of(config)
        state = rows.tokens * int(text.hidden_size) * precision_of(self.config).dtype.itemsize
        return Batches(math.ceil(self.config.train.sequences / rows.count), state, *self._ends())

    def _ends(self) -> tuple[int, int]:
        """Bytes of embedding and head, and of the head alone, which a loss reads once (models/text/tiled_loss).

        Nothing for a model on a CPU, where they lie in the page cache.
        """
        if self.device.type == "cpu":
            return 0, 0
        text = self.model[0].get_text_config()
        one = int(text.vocab_size) * int(text.hidden_size) * precision_of(self.config).dtype.itemsize
        tied = bool(getattr(text, "tie_word_embeddings", False))
        return one if tied else 2 * one, one

    def head_tiles(self, way: Way) -> tuple[int, int]:
        return (0, 0) if way.ends else tiles_of_head(self.config, self.model[0])

    @property
    def state_bytes(self) -> int:
        return self.batches.state_bytes

    def ways(self, budget: int) -> Iterator[Way]:
        yield RESIDENT
        if refusal := why_not_streamed(self.config):
            raise NotStreamed(refusal)
        yield from streaming_ways(self.plan, self.batches, budget)

    def plan(self, way: Way) -> TextRunPlan:
        """What the run takes that way; each way is rehearsed once."""
        if way not in self._plans:
            model_config, files = self.model
            config = self.with_tokens(way.micro_tokens)
            found = forecast_run(
                config, model_config, precision_of(config), runtime=self.runtime(streamed=way.streamed), files=files,
                returning=self.returning(way), workload=self.workload, way=way,
            )  # fmt: skip
            self._plans[way] = found.searching(self.workload.members)
        return self._plans[way]

    def returning(self, way: Way) -> bool:
        """Whether a process that goes this way gives freed memory back."""
        return bool(self.config.memory.limit)

    def with_tokens(self, micro_tokens: int | None) -> RunConfig:
        """The settings with another train.micro_tokens, if one is given."""
        return self.config if micro_tokens is None else self.config.changed(train={"micro_tokens": micro_tokens})

    def words(self, way: Way, plan: TextRunPlan) -> str:
        """The way, the micro-batches at once, and where the inputs of blocks are."""
        if not way.streamed:
            return super().words(way, plan)
        on_gpu = self.device.type != "cpu"
        memory, spilled = (f"on {self.device}", "in host memory") if on_gpu else ("in memory", "on disk")
        host = keeps_in_host(self, way, plan)
        ends = f", embedding and head {memory}" if way.ends else f", the head from {'pinned host memory' if host else 'disk'}"
        inputs = f"{spilled if way.spilled else memory}{ends * on_gpu}"
        if way.slots >= plan.blocks:
            return f"every frozen block stays {memory} and is computed again in the backward pass, its inputs {inputs}"
        streamed = way_text(way, plan.blocks, self.device, host=host)
        return f"frozen {streamed}, {way.together} micro-batches at once, the inputs of blocks {inputs}"

    def size_words(self) -> str:
        members, rank = self.workload.members, self.config.lora.rank
        several = f" and {members} adapters of rank {rank} in training at once" if members > 1 else ""
        return f", with micro-batches of {self.smallest_batch:,} tokens{several}"

    @property
    def smallest_batch(self) -> int:
        """Tokens of the smallest micro-batch that is tried."""
        return self.rows.tokens

    def advice(self) -> str:
        more = "--together, --rank-choices, " if self.workload.members > 1 else ""
        return f"Raise the budget, or lower {more}lora.rank, data.max_tokens or train.micro_tokens."


def precision_of(config: RunConfig) -> Precision:
    """How the weights will be stored and multiplied: on a CUDA device if model.device says so, else on this machine's CPU."""
    device = planned_on(config.model.device)
    dtype = text_dtype_for(config.model.dtype, device)
    return Precision(dtype, products_for(config.model, dtype, device), config.model.quantize, device)


def tiles_of_head(config: RunConfig, model_config: Any) -> tuple[int, int]:
    """In how many tiles a head comes to a GPU from the store, and the bytes of one."""
    text = model_config.get_text_config()
    words, width = int(text.vocab_size), int(text.hidden_size)
    return math.ceil(words / TILE), min(words, TILE) * width * precision_of(config).dtype.itemsize


def why_not_streamed(config: RunConfig, processes: int = 1) -> str:
    """Why a run cannot stream its blocks, with the remedy; empty where it can. Pairs are cut, and rows measured, on a model in
    memory only.
    """
    if processes > 1:
        return f"Its blocks cannot be streamed: {processes} processes train together. Start one, or set train.shard."
    if config.ranks.choose == "prune":
        return (
            "Its blocks cannot be streamed: ranks.choose is prune, which cuts pairs of a model in memory. Take ranks.choose "
            "given, whose ranks are those of lora.rank and lora.rank_pattern."
        )
    if measures := measures_rows(config):
        return (
            f"Its blocks cannot be streamed: {measures} measures training rows on a model in memory. Choose the ranks in a run "
            "without the budget (--dry-run --json prints them) and give them in lora.rank_pattern, with lora.start kaiming."
        )
    return ""

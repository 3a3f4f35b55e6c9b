"""How a text run without memory.budget fits into what is free on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lorakeet.config import RunConfig
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import Budget
from lorakeet.memory.free import free_memory
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.planning.fit import fit_budget, fit_free
from lorakeet.planning.forecast_text_run import TextRunPlan, Workload, measures_rows
from lorakeet.planning.rehearse_text import SECONDS_BESIDE, STEP, planning_within
from lorakeet.planning.text_run import TextRun, streaming_ways, why_not_streamed
from lorakeet.runs.residency import ALONE, FEWEST, RESIDENT, MemoryPlan, Residency, Way
from lorakeet.train.processes import ALONE as ONE_PROCESS
from lorakeet.train.processes import Processes

FEWEST_TOKENS = 512  # of a micro-batch: fewer leave a GPU idle, and a block computed again costs less than that
DIFFERENT = 1 / 16  # of what is free: two GPUs of one kind differ by less
ONCE = 1 << 20  # bytes that computing any block again takes, beside what each does: some KB were planned


def fit_text_run(
    config: RunConfig, say: Callable[[str], None], workload: Workload | None = None, processes: Processes = ONE_PROCESS
) -> Residency[TextRunPlan]:
    """How a run keeps memory.budget. With a `workload` it is planned without a budget too, within what is free on its device.

    Raises as `fit_budget`. Shards on CUDA devices are not planned.
    """
    if config.memory.limit:
        return fit_budget(TextRun(config, workload or Workload(), say), config.memory.limit, say)
    run, several = UnboundTextRun(config, workload or Workload(), say), processes.count > 1
    on_gpu = run.device.type == "cuda"
    if workload is None or not (on_gpu or run.device.type == "cpu"):
        return Residency()
    free = free_memory(run.device)
    if not several:
        with planning_within(SECONDS_BESIDE):
            return fit_free(run, free, say)
    if on_gpu and config.train.shard:
        return Residency()
    run.processes = processes.count
    with planning_within(SECONDS_BESIDE):
        found = fit_free(run, _least_free(free, processes, say) if on_gpu else replace(free, bytes=Budget().bytes), say)
    return replace(found, budget=Budget(), gpu=None)


def _least_free(free: Budget, processes: Processes, say: Callable[[str], None]) -> Budget:
    """What is free on the GPU that has least of it, so that all processes choose the same way; said where the GPUs differ."""
    each = processes.total(*(free.bytes * (rank == processes.rank) for rank in range(processes.count)))
    least, most = min(each), max(each)
    small, large = (f"the GPU of process {each.index(size)}" for size in (least, most))
    if most - least > most * DIFFERENT:
        say(
            f"The GPUs differ: {bytes_text(least)} are free on {small}, {bytes_text(most)} on {large}. Every process does what "
            "fits the smaller one. For more, start as many processes as there are large GPUs, and choose them with "
            "CUDA_VISIBLE_DEVICES."
        )
    return replace(free, bytes=least, text=bytes_text(least), free=small)


class UnboundTextRun(TextRun):
    """A run, or a search, without memory.budget.

    Its ways, the preferred one first: everything in memory; fewer tokens at once; blocks that are computed again; streamed
    blocks. Each with a second base for the certificate if that fits too. All but fewer tokens, whose sums are rounded in another
    order, give the same bits.
    """

    processes = 1  # that train together, each with the whole base

    def ways(self, budget: int) -> Iterator[Way]:
        tokens = self.fewer_tokens()
        for count in (None, *tokens):
            yield from self._with_bases(Way(micro_tokens=count))
        fewest = tokens[-1] if tokens else None
        if not self._why_not_recomputed():
            yield from self._with_bases(Way(recomputed=True, slots=ALONE, micro_tokens=fewest))
        if refusal := why_not_streamed(self.config, self.processes):
            raise NotStreamed(refusal)

        def planned(way: Way) -> MemoryPlan:
            return self.plan(replace(way, micro_tokens=fewest, one_base=True))

        for way in streaming_ways(planned, self.batches_of(fewest), budget):
            yield replace(way, micro_tokens=fewest, one_base=True)

    def fewer_tokens(self) -> list[int]:
        """Values of train.micro_tokens, each half of the one before, down to the longest row or FEWEST_TOKENS."""
        found, least = [self.rows.tokens], max(self.rows.length, FEWEST_TOKENS)
        while found[-1] > least:
            found.append(max(least, found[-1] // 2))
        return found[1:]

    def plan(self, way: Way) -> TextRunPlan:
        found = super().plan(replace(way, one_base=False))
        found = found.with_one_base() if way.one_base else found
        if not way.recomputed or not found.alike:
            return found
        return self._keeping_blocks(found, self.plan(replace(way, recomputed=False, slots=FEWEST)))

    def _keeping_blocks(self, least: TextRunPlan, whole: TextRunPlan) -> TextRunPlan:
        """The plan in which each further block may keep everything: what that adds to a step.

        With k of n equal blocks computed again, a step holds at most max(a − k·b, c + k·d), which is convex in k. So the line
        from k = 0 (`whole`) to k = n − 1 (`least`) bounds it, but for what the first such block adds.
        """
        step, everything = (one.forecast.phase(STEP).bytes for one in (least, whole))
        size = -(-(everything + ONCE - step) // (least.alike - 1))
        if size <= 0:
            return least
        kept = {"blocks": least.alike, "block_bytes": size, "growing": (STEP,), "slot_kind": "saved activations"}
        return replace(least, rate_trial=None, **kept)  # type: ignore[arg-type]

    def returning(self, way: Way) -> bool:
        return self.device.type == "cpu" and way != RESIDENT

    def words(self, way: Way, plan: TextRunPlan) -> str:
        text = super().words(way, plan)
        if way.recomputed:
            blocks = plan.alike or int(self.model[0].get_text_config().num_hidden_layers)
            text += f", and {blocks - way.slots} of {blocks} blocks are computed again in the backward pass"
        if way.micro_tokens is not None:
            text += f"; micro-batches have {way.micro_tokens:,} tokens in place of {self.config.train.micro_tokens:,}"
        return text + "; the certificate uses the base that was trained on" * way.one_base

    @property
    def smallest_batch(self) -> int:
        return min([self.rows.tokens, *self.fewer_tokens()])

    def advice(self) -> str:
        more = "--together, --rank-choices, " if self.workload.members > 1 else ""
        return (
            f"Lower {more}data.max_tokens or lora.rank, or set model.quantize to nf4. memory.budget sets another bound."
        )

    def _with_bases(self, way: Way) -> Iterator[Way]:
        """The way with two bases in the certificate, then with one; on a CPU two only where nothing else is saved."""
        if self.device.type != "cpu" or way == RESIDENT:
            yield way
        yield replace(way, one_base=True)

    def _why_not_recomputed(self) -> str:
        """The setting with which no block is computed again; empty if there is none."""
        if self.config.train.keep_prefix_states:
            return "train.keep_prefix_states"
        return "a search" if self.workload.members > 1 else measures_rows(self.config)

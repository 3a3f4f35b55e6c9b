"""The plan of a run on text: its memory by phase, what keeps a budget, what would help where none does, and how fast it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text, duration_text
from lorakeet.kinds.protocol import NO_BOUND, Advice, PlanResult
from lorakeet.kinds.terminal import memory_table, show_advice, show_peak, show_targets
from lorakeet.kinds.text.run_time import Speed, measured_speed
from lorakeet.kinds.text.stacked import with_earlier
from lorakeet.kinds.trained_targets import remarks_before, remarks_of_peft
from lorakeet.memory.allocator import return_freed_memory, slack
from lorakeet.memory.budget import Budget, enough_for, larger_than_machine
from lorakeet.memory.forecast import Forecast, Phase, phase_at
from lorakeet.memory.free import free_memory
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.remembered import remembered
from lorakeet.memory.usage import Usage
from lorakeet.models.files.source import bytes_to_unpack
from lorakeet.models.placement import DTYPES, narrow_for
from lorakeet.models.text.from_config import config_of, local_files
from lorakeet.planning.check import later_phases, with_later
from lorakeet.planning.encoded_rows import workload_of_files
from lorakeet.planning.fit import WayChoice, choose, fit_free, host_memory, too_small_text
from lorakeet.planning.forecast_text_run import LATER, RowLengths, TextRunPlan, forecast_run
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import SECONDS_BESIDE, planning_within
from lorakeet.planning.text_run import LEAST, TextRun, bytes_moved, precision_of
from lorakeet.planning.unbound_text_run import UnboundTextRun
from lorakeet.ranks.prune import final_budget
from lorakeet.runs.residency import RESIDENT

UNPACK = "unpack"


@dataclass(frozen=True)
class Streamed:
    """A run with streamed blocks: the way, in words too, and the bytes that a step moves from and to the disk."""

    choice: WayChoice[TextRunPlan]
    words: str
    moved: int

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        way, plan = self.choice.way, self.choice.plan
        how = {"slots": way.slots, "together": way.together, "aside": way.spilled, "moved": self.moved}
        return {"planned": plan.peak, **how, "phases": plan.to_mapping()["phases"]}


@dataclass(frozen=True, kw_only=True)
class TextPlanResult(PlanResult):
    """The forecast of a run on text; `least` and `advice` if its budget cannot be kept."""

    planned: TextRunPlan
    precision: Precision
    speed: Speed | None  # None for a CUDA device, whose speed is not estimated
    host_memory: str = ""  # the host memory of a streamed run on a CUDA device, in words
    streamed: Streamed | None = None  # how `lorakeet finetune` keeps a bound that is too small for all weights
    least: int | None = None  # the smallest budget that streaming keeps
    later: tuple[Phase, ...] = ()  # merging and exporting within the budget, or the least that they take
    lengths: RowLengths | None = None  # of the rows, where there are some
    labelled: bool | None = None  # whether the rows have labels; None if they are not known

    @property
    def later_commands(self) -> tuple[str, ...]:
        return tuple(phase.name for phase in self.planned.forecast.phases if phase.name in LATER)

    @property
    def unpacks_too_much(self) -> bool:
        """True if a .gguf file must still be unpacked, and that takes more than the budget."""
        first = self.planned.forecast.phases[0]
        return first.name == UNPACK and first.bytes > self.budget.bytes

    @property
    def seconds(self) -> float:
        """The least time of a micro-batch in training: the longer of its arithmetic and its writing."""
        work, speed = self.planned.work, self.speed
        return math.nan if speed is None else speed.seconds(work)

    @property
    def micro_batches(self) -> int:
        """The micro-batches of a step of rows as long as those of the largest one."""
        return math.ceil(self.config.train.sequences / self.planned.rows.count)

    @property
    def steps(self) -> int | None:
        """The steps of the run; None where its rows are not known."""
        train, lengths = self.config.train, self.lengths
        return None if lengths is None else train.total_steps(math.ceil(lengths.rows / train.sequences))

    @property
    def training_seconds(self) -> float | None:
        """The time of all steps at that speed: of the rows' tokens, or of rows of data.max_tokens. None if no step is known."""
        train, lengths, steps = self.config.train, self.lengths, self.steps
        if lengths is not None and steps is not None:
            tokens = steps * min(train.sequences, lengths.rows) * lengths.tokens / lengths.rows
            return tokens * self.seconds / self.planned.rows.tokens
        return None if train.steps is None else train.steps * self.micro_batches * self.seconds

    def to_mapping(self) -> dict[str, Any]:
        found = {
            **super().to_mapping(),
            "micro_batch": {"rows": self.planned.rows.count, "tokens": self.planned.rows.tokens},
            "streamed": None if self.streamed is None else self.streamed.to_mapping(),
            "streamed_least": self.least,
            "advice": [{**dataclasses.asdict(item), "change": item.change} for item in self.advice],
            "later": [phase.to_mapping() for phase in self.later],
        }
        if self.speed is not None:
            found["speed"] |= {
                "flops_per_second": self.speed.flops,
                "bytes_per_second": self.speed.bytes,
                "seconds_at_least": self.seconds,
                "tokens_per_second_at_most": self.planned.rows.tokens / self.seconds,
                "training_seconds_at_least": self.training_seconds,
            }
        return found


def _within_bound(result: TextPlanResult, run: TextRun, planned: TextRunPlan, console: Console) -> TextPlanResult:
    """`result` with the way that keeps the budget, or what is free on the named machine; or else with what would help."""
    config, precision, bound = result.config, result.precision, result.bound
    choice = choose(run, bound)
    if choice.why_no_more and not choice.fits:
        return dataclasses.replace(result, refused=(*result.refused, too_small_text(run, choice, bound)))
    if choice.fits:
        way, plan = choice.way, choice.plan
        whole = dataclasses.replace(plan, forecast=with_later(plan.forecast, result.later))
        whole = whole if result.unpacks_too_much else _with_unpacking(whole, config, precision)
        moved = bytes_moved(way, plan, run.batches_of(way.micro_tokens)) if way.streamed else 0
        streamed = Streamed(dataclasses.replace(choice, plan=whole), run.words(way, plan), moved)
        pinned = host_memory(run, way, plan)[1] if precision.on_gpu and way.streamed else ""
        return dataclasses.replace(result, streamed=streamed, host_memory=pinned)
    (model_config, files), runtime = run.model, run.runtime(streamed=False)

    def forecast(other: RunConfig, precision: Precision) -> TextRunPlan:
        return forecast_run(other, model_config, precision, runtime=runtime, files=files, returning=True, workload=run.workload)

    def least(other: RunConfig) -> int:
        return TextRun(other, run.workload, console.print, run.model).plan(LEAST).peak

    advice = text_advice(config, precision, planned, forecast, least, bound)
    peak = run.plan(LEAST).peak
    refused = f"it needs at least {enough_for(min(peak, result.peak))}, with its blocks streamed from disk."
    return dataclasses.replace(result, least=peak, advice=advice, refused=(*result.refused, refused))


def _with_unpacking(planned: TextRunPlan, config: RunConfig, precision: Precision) -> TextRunPlan:
    """`planned` with a phase for unpacking a .gguf file, if that is still to be done; it takes no memory of a GPU."""
    size = 0 if precision.on_gpu else bytes_to_unpack(config.model)
    if not size:
        return planned
    unpacking = phase_at(UNPACK, Usage(size, {"scratch": size}), resident_bytes(), slack(0))
    return dataclasses.replace(planned, forecast=Forecast((unpacking, *planned.forecast.phases)))


def _show(result: TextPlanResult, console: Console) -> None:
    """Prints the memory table, the peak against the budget, what would help, and the bound on the speed."""
    say = partial(console.print, soft_wrap=True)
    planned, rows, config = result.planned, result.planned.rows, result.config
    device = str(result.device) if result.precision.on_gpu else None
    console.print(memory_table(planned.forecast, device))
    trained = f"{planned.plan.parameters:,} trained parameters"
    if config.ranks.choose == "auto":
        trained = f"At most {trained}, for the ranks that take the most memory of those that ranks.choose auto may choose"
    if config.ranks.choose == "prune":
        left = final_budget(config.ranks, planned.plan)
        cut = "once ranks.choose prune has cut them, which lowers memory and time (before that, no adapter is saved)"
        trained = f"{trained} at first, {left:,} in pairs {cut}"
    say(f"{trained}; micro-batches of {rows.words}, planned as if all were targets.")
    show_peak(result, console, " with its weights in memory")
    if result.streamed is not None:
        plan, how = result.streamed.choice.plan, result.streamed.words
        console.print(memory_table(plan.forecast, device))
        when = "Once it is unpacked, finetune" if result.unpacks_too_much else "finetune"
        kept = f"fits what is free on {result.free.free}" if result.free else "keeps the budget"
        say(f"{when} {kept}: {bytes_text(plan.peak)} (the table above), {how}.")
        if result.host_memory:
            say(result.host_memory)
    for why in result.refused:
        say(f"finetune refuses: {why}", markup=False)
    if result.advice:
        say("It would take:")
    show_advice(result, console, (" with weights in memory", " streamed"))
    for phase in result.later:
        if phase.bytes > result.budget.bytes:
            needed = enough_for(phase.bytes).replace(" ", "")
            say(f"lorakeet {phase.name} of its adapter will need --memory {needed}, with streaming.")
    say(_speed_text(result))
    if not result.labelled and config.evaluate.answers:
        spec, where = config.evaluate, "" if result.labelled is False else ", if rows have no labels"
        say(
            f"The evaluation then answers up to {spec.answers} held-out prompts{where}, in at most {spec.answer_tokens} tokens "
            "each, by adapter, base and few-shot base: evaluate.answers and evaluate.answer_tokens set that."
        )


def _refusals(result: TextPlanResult, run: TextRun, free: Budget, say: Callable[[str], None]) -> Iterator[str]:
    """Why a run would not start, whatever its blocks; says how it fits into what is `free` on a device that is here."""
    if run.workload.refused:
        yield run.workload.refused
    if result.unpacks_too_much:
        size = bytes_text(result.planned.forecast.phases[0].bytes)
        yield (
            f"unpacking {result.config.model.path}, which is done once, takes {size}. Raise the budget, or run once without it: "
            "later runs read the unpacked copy."
        )
    if free:
        try:
            fit_free(run, free, say)
        except ConfigError as error:
            yield str(error)


def _speed_text(result: TextPlanResult) -> str:
    work, speed = result.planned.work, result.speed
    flops, written = f"{work.flops / 1e9:,.0f} GFLOP", f"{work.written / 1e9:.1f} GB of results"
    if speed is None:
        return (
            f"A micro-batch takes {flops} and {written}; the speed of a CUDA device is not estimated. The plan follows the code "
            "for CUDA devices with shapes on the CPU; its allowances for allocator and CUDA context were not measured on one."
        )
    rows, train, lengths = result.planned.rows, result.config.train, result.lengths
    seconds, each = result.training_seconds, f"if each row has {rows.length:,} tokens"
    if lengths is not None:
        each = f"with up to {lengths.tokens:,} tokens of {lengths.rows:,} rows in an epoch"
    if seconds is None:
        seconds, what = 1000 / rows.count * result.seconds, "for every 1,000 rows, in each epoch,"
    elif train.steps is not None:
        what = f"for the {train.steps:,} steps of {train.batch_size} rows,"
    else:
        what = f"for {train.epochs:g} epochs,"
    rate = rows.tokens / result.seconds
    rate_text = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    return (
        f"Training alone takes {'at least' if lengths is None else 'about'} {duration_text(seconds)} here {what} {each}. A full "
        f"micro-batch takes at least {duration_text(result.seconds)}: {flops} at {speed.flops / 1e9:,.0f} GFLOP/s, {written} at "
        f"{speed.bytes / 1e9:.1f} GB/s. So at most {rate_text} tokens a second are trained."
    )


def text_advice(
    config: RunConfig,
    precision: Precision,
    planned: TextRunPlan,
    forecast: Callable[..., TextRunPlan],
    streamed_least: Callable[[RunConfig], int],
    bound: Budget,
) -> tuple[Advice, ...]:
    """Changes of the settings that would help to keep `bound`, the one with the lowest peak first.

    If the weights alone exceed it, changes other than of their precision are tried on a streamed run, until one fits.
    """
    budget, found = bound.bytes, list[Advice]()
    for change, other, kept in _changes(config, precision, planned):
        streamed = kept == precision and planned.base > budget
        if not streamed:
            found.append(Advice(change, forecast(other, precision=kept).peak))
        elif not any(item.peak <= budget for item in found):
            found.append(Advice(change, streamed_least(other), streamed=True))
    return tuple(sorted(found, key=lambda item: item.peak))


def _changes(config: RunConfig, precision: Precision, plan: TextRunPlan) -> Iterator[tuple[dict[str, str], RunConfig, Precision]]:
    """Changes that take less memory: the settings, the run and the precision with them."""
    if precision.dtype == torch.float32:
        narrow = narrow_for(precision.device)
        yield {"model.dtype": narrow}, config, dataclasses.replace(precision, dtype=DTYPES[narrow])
    if precision.quantize.method == "none":
        packed = dataclasses.replace(precision.quantize, method="nf4")
        yield {"model.quantize.method": "nf4"}, config, dataclasses.replace(precision, quantize=packed)
    rows, lora, answers = plan.rows, config.lora, config.train.answers
    if config.train.moments != "8bit":
        yield {"train.moments": "8bit"}, config.changed(train={"moments": "8bit"}), precision
    if rows.count > answers:  # which are never apart
        fewer = rows.length * max(answers, rows.count // 2)
        yield {"train.micro_tokens": str(fewer)}, config.changed(train={"micro_tokens": fewer}), precision
    elif rows.length > 64:
        half, one = rows.length // 2, answers * (rows.length // 2)
        change, shorter = {"data.max_tokens": str(half)}, config.changed(data={"max_tokens": half})
        if config.train.micro_tokens > one:  # else two such rows would be in a micro-batch
            change, shorter = change | {"train.micro_tokens": str(one)}, shorter.changed(train={"micro_tokens": one})
        yield change, shorter, precision
    if lora.rank >= 8:
        yield {"lora.rank": str(lora.rank // 2)}, config.changed(lora={"rank": lora.rank // 2}), precision
    if lora.target_modules == ("all-linear",):
        yield {"lora.target_modules": "attention"}, config.changed(lora={"target_modules": ("attention",)}), precision


def plan_text(
    config: RunConfig, console: Console, free: Budget, watch: Callable[[PlanResult], None] | None
) -> TextPlanResult:
    """Forecasts a run on text, prints the forecast, and what keeps its budget or would help (protocol.RunKind.plan)."""
    config = with_earlier(config)
    budget, precision = config.memory.limit, precision_of(config)
    if budget and not precision.on_gpu:
        if warning := larger_than_machine(budget):
            console.print(warning, soft_wrap=True)
        return_freed_memory()  # as a run with a budget does
    model_config, files = config_of(config.model, console.print), local_files(config.model.path)
    measure = partial(measured_speed, precision.products)
    speed = None if precision.on_gpu else remembered(lambda: ("speed", precision.products), measure)
    workload = workload_of_files(config, model_config, partial(console.print, markup=False, soft_wrap=True))
    here = not budget and not free and precision.on_gpu and torch.cuda.is_available()
    kind = UnboundTextRun if here or free else TextRun
    run = kind(config, workload, console.print, (model_config, files))
    planned = run.plan(RESIDENT)
    later: tuple[Phase, ...] = ()
    if budget and not precision.on_gpu:  # merging and exporting are checked on the CPU
        later = later_phases(config, model_config, planned.plan, budget)
    planned = dataclasses.replace(planned, forecast=with_later(planned.forecast, later))
    result = TextPlanResult(
        config=config, device=precision.device, planned=_with_unpacking(planned, config, precision), precision=precision,
        speed=speed, later=later, lengths=run.lengths, free=free, labelled=workload.labelled,
    )  # fmt: skip
    if watch is not None:
        watch(result)
    said = partial(console.print, markup=False, soft_wrap=True)
    refused = _refusals(result, run, free_memory(precision.device) if here else NO_BOUND, said)
    result = dataclasses.replace(result, refused=tuple(refused))
    if planned.peak > result.bound.bytes:
        with planning_within(SECONDS_BESIDE) if free else nullcontext():
            result = _within_bound(result, run, planned, console)
    _show(result, console)
    show_targets(planned.plan, (*remarks_before(planned.plan), *remarks_of_peft(model_config, planned.plan)), console)
    return result

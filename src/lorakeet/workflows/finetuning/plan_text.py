"""The forecast of a run on text for `lorakeet plan`: memory by phase, the budget, what would help, and a bound on its speed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.allocator import return_freed_memory, slack
from lorakeet.memory.budget import enough_for, larger_than_machine
from lorakeet.memory.forecast import Forecast, Phase, phase_at
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.usage import Usage
from lorakeet.models.files.source import bytes_to_unpack
from lorakeet.models.text.from_config import config_of, local_files
from lorakeet.ranks.prune import final_budget
from lorakeet.workflows.finetuning.kind import Advice, PlanResult
from lorakeet.workflows.finetuning.terminal import memory_table, show_advice, show_peak
from lorakeet.workflows.planning.fit import WayChoice, choose, host_memory, too_small_text
from lorakeet.workflows.planning.forecast_text_run import Precision, TextRunPlan, forecast_run
from lorakeet.workflows.planning.later_verbs import later_phases, with_later
from lorakeet.workflows.planning.streaming import LEAST, bytes_moved
from lorakeet.workflows.planning.text_run import TextRun, Workload, precision_of
from lorakeet.workflows.runs.residency import RESIDENT

UNPACK = "unpack"
PROBE_SIZE, PROBE_BYTES, PROBE_REPEATS = 1024, 64 << 20, 5


@dataclass(frozen=True)
class Speed:
    """The highest measured rates of this machine: FLOPs per second in matrix products, and bytes written per second."""

    flops: float
    bytes: float


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
    streamed: Streamed | None = None  # how `lorakeet finetune` keeps a budget that is too small for all weights
    least: int | None = None  # the smallest budget that streaming keeps
    later: tuple[Phase, ...] = ()  # merging and exporting within the budget, or the least that they take

    @property
    def unpacks_too_much(self) -> bool:
        """True if a .gguf file must still be unpacked, and that takes more than the budget."""
        first = self.planned.forecast.phases[0]
        return first.name == UNPACK and first.bytes > self.budget.bytes

    @property
    def seconds(self) -> float:
        """The least time of a micro-batch in training: the longer of its arithmetic and its writing."""
        work, speed = self.planned.work, self.speed
        return math.nan if speed is None else max(work.flops / speed.flops, work.written / speed.bytes)

    def to_mapping(self) -> dict[str, Any]:
        found = {
            **super().to_mapping(),
            "micro_batch": {"rows": self.planned.rows.count, "tokens": self.planned.rows.tokens},
            "streamed": None if self.streamed is None else self.streamed.to_mapping(),
            "streamed_least": self.least,
            "advice": [dataclasses.asdict(item) for item in self.advice],
            "later": [phase.to_mapping() for phase in self.later],
        }
        if self.speed is not None:
            found["speed"] |= {
                "flops_per_second": self.speed.flops,
                "bytes_per_second": self.speed.bytes,
                "seconds_at_least": self.seconds,
                "tokens_per_second_at_most": self.planned.rows.tokens / self.seconds,
            }
        return found


def plan_text(config: RunConfig, console: Console) -> TextPlanResult:
    """Plans a run on text from the model's configuration, and prints the plan. Raises ConfigError for an unknown model."""
    budget, precision = config.memory.limit, precision_of(config)
    if budget and not precision.on_gpu:
        if warning := larger_than_machine(budget):
            console.print(warning, soft_wrap=True)
        return_freed_memory()  # as a run with a budget does
    model_config, files = config_of(config.model, console.print), local_files(config.model.path)
    speed = None if precision.on_gpu else _measured_speed(precision.products)
    run = TextRun(config, Workload(), console.print, (model_config, files))
    planned = run.plan(RESIDENT)
    later: tuple[Phase, ...] = ()
    if budget and not precision.on_gpu:  # merging and exporting are checked on the CPU
        later = later_phases(config, model_config, planned.plan, budget)
    planned = dataclasses.replace(planned, forecast=with_later(planned.forecast, later))
    result = TextPlanResult(
        config=config, device=precision.device, planned=_with_unpacking(planned, config, precision), precision=precision,
        speed=speed, later=later,
    )  # fmt: skip
    if planned.peak > budget.bytes:
        result = _within_budget(result, run, planned, console)
    _show(result, console)
    return result


def _within_budget(result: TextPlanResult, run: TextRun, planned: TextRunPlan, console: Console) -> TextPlanResult:
    """`result` with the way in which streaming keeps the budget, or else with what would help."""
    config, precision, choice = result.config, result.precision, choose(run, result.budget)
    if choice.why_no_more:
        console.print(f"finetune refuses: {too_small_text(run, choice, result.budget)}", soft_wrap=True)
        return result
    if choice.fits:
        way, plan = choice.way, choice.plan
        whole = dataclasses.replace(plan, forecast=with_later(plan.forecast, result.later))
        whole = whole if result.unpacks_too_much else _with_unpacking(whole, config, precision)
        streamed = Streamed(dataclasses.replace(choice, plan=whole), run.words(way, plan), bytes_moved(way, plan, run.batches))
        pinned = host_memory(run, way, plan)[1] if precision.on_gpu else ""
        return dataclasses.replace(result, streamed=streamed, host_memory=pinned)
    model, runtime = run.model, run.runtime(streamed=False)
    forecast = partial(forecast_run, model_config=model[0], runtime=runtime, files=model[1], returning=True)

    def least(other: RunConfig) -> int:
        return TextRun(other, Workload(), console.print, model).plan(LEAST).peak

    advice = text_advice(config, precision, planned, forecast, least)
    return dataclasses.replace(result, least=run.plan(LEAST).peak, advice=advice)


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
    say(f"{trained}; micro-batches of {rows.count} × {rows.length} tokens, all of them targets.")
    show_peak(result, console, " with its weights in memory")
    if config.train.cuda_graphs:
        also = " finetune refuses it together with memory.budget." if result.budget else ""
        say(f"train.cuda_graphs is true. CUDA graphs are not counted; comparing them doubles a micro-batch's activations.{also}")
    if result.unpacks_too_much:
        say(
            f"finetune refuses: unpacking {config.model.path}, which is done once, takes "
            f"{bytes_text(planned.forecast.phases[0].bytes)}. Raise the budget, or run once without it: later runs read the "
            "unpacked copy."
        )
    if result.streamed is not None:
        plan, how = result.streamed.choice.plan, result.streamed.words
        console.print(memory_table(plan.forecast, device))
        when = "Once it is unpacked, finetune" if result.unpacks_too_much else "finetune"
        say(f"{when} keeps the budget: {bytes_text(plan.peak)} (the table above), {how}.")
        if result.host_memory:
            say(result.host_memory)
    if result.least is not None:
        least = enough_for(min(result.least, result.peak))
        say(f"finetune refuses: it needs at least {least}, with its blocks streamed from disk. It would take:")
    show_advice(result, console, (" with weights in memory", " streamed"))
    for phase in result.later:
        if phase.bytes > result.budget.bytes:
            needed = enough_for(phase.bytes).replace(" ", "")
            say(f"lorakeet {phase.name} of its adapter will need --memory {needed}, with streaming.")
    say(_speed_text(result))


def _speed_text(result: TextPlanResult) -> str:
    work, speed = result.planned.work, result.speed
    flops, written = f"{work.flops / 1e9:,.0f} GFLOP", f"{work.written / 1e9:.1f} GB of results"
    if speed is None:
        return (
            f"A micro-batch takes {flops} and {written}; the speed of a CUDA device is not estimated. The plan follows the code "
            "for CUDA devices with shapes on the CPU; its allowances for allocator and CUDA context were not measured on one."
        )
    return (
        f"A micro-batch takes at least {result.seconds:.2g} s here: {flops} at {speed.flops / 1e9:,.0f} GFLOP/s, {written} at "
        f"{speed.bytes / 1e9:.1f} GB/s; at most {result.planned.rows.tokens / result.seconds:,.0f} tokens a second."
    )


def text_advice(
    config: RunConfig,
    precision: Precision,
    planned: TextRunPlan,
    forecast: Callable[..., TextRunPlan],
    streamed_least: Callable[[RunConfig], int],
) -> tuple[Advice, ...]:
    """Changes of the settings that would help, the one with the lowest peak first.

    If the weights alone exceed the budget, changes other than of their precision are tried on a streamed run, until one fits.
    """
    budget, found = config.memory.limit.bytes, list[Advice]()
    for change, other, kept in _changes(config, precision, planned):
        streamed = kept == precision and planned.base > budget
        if not streamed:
            found.append(Advice(change, forecast(other, precision=kept).peak))
        elif not any(item.peak <= budget for item in found):
            found.append(Advice(change, streamed_least(other), streamed=True))
    return tuple(sorted(found, key=lambda item: item.peak))


def _changes(config: RunConfig, precision: Precision, planned: TextRunPlan) -> Iterator[tuple[str, RunConfig, Precision]]:
    """Changes that take less memory: the flag, the settings and the precision with it."""
    if precision.dtype == torch.float32:
        narrow = dataclasses.replace(precision, dtype=torch.bfloat16)
        yield "--model.dtype bfloat16", config, narrow
    if precision.quantize.method == "none":
        packed = dataclasses.replace(precision, quantize=dataclasses.replace(precision.quantize, method="nf4"))
        yield "--model.quantize nf4", config, packed
    rows, lora = planned.rows, config.lora
    if config.train.moments != "8bit":
        small = dataclasses.replace(config.train, moments="8bit")
        yield "--train.moments 8bit", dataclasses.replace(config, train=small), precision
    if rows.count > 1:
        fewer = rows.length * (rows.count // 2)
        train = dataclasses.replace(config.train, micro_tokens=fewer)
        yield f"--train.micro_tokens {fewer}", dataclasses.replace(config, train=train), precision
    elif rows.length > 64:
        half = rows.length // 2
        change, shorter = f"--data.max_tokens {half}", dataclasses.replace(config.data, max_tokens=half)
        train = config.train
        if train.micro_tokens > half:  # else two such rows would be in a micro-batch
            change, train = f"{change} --train.micro_tokens {half}", dataclasses.replace(train, micro_tokens=half)
        yield change, dataclasses.replace(config, data=shorter, train=train), precision
    if lora.rank >= 8:
        lower = dataclasses.replace(lora, rank=lora.rank // 2)
        yield f"--lora.rank {lower.rank}", dataclasses.replace(config, lora=lower), precision
    if lora.target_modules == ("all-linear",):
        fewer_targets = dataclasses.replace(lora, target_modules=("attention",))
        yield "--lora.target_modules attention", dataclasses.replace(config, lora=fewer_targets), precision


def _measured_speed(products: torch.dtype) -> Speed:
    """The best of a few square products and of a few copies, which take about a tenth of a second."""
    square = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=products)
    source = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(_timed(lambda: torch.mm(square, square)) for _ in range(PROBE_REPEATS))
    copy = min(_timed(lambda: target.copy_(source)) for _ in range(PROBE_REPEATS))
    return Speed(2 * PROBE_SIZE**3 / product, PROBE_BYTES / copy)


def _timed(work: Callable[[], Any]) -> float:
    """The seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

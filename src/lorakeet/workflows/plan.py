"""`lorakeet plan`: how much memory and time a run will take, phase by phase, before anything is loaded."""

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
from lorakeet.memory.budget import Budget, enough_for, larger_than_machine
from lorakeet.memory.forecast import Forecast, Phase, phase_at
from lorakeet.memory.ledger import Work
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.usage import Usage
from lorakeet.models.files.source import bytes_to_unpack
from lorakeet.models.text.from_config import config_of, local_files
from lorakeet.ranks.prune import final_budget
from lorakeet.workflows import finetune as _run  # noqa: F401 - what a run has in memory is in memory here, to be counted
from lorakeet.workflows.finetuning.terminal import memory_table
from lorakeet.workflows.image_plan import ImagePlanResult, plan_images
from lorakeet.workflows.options import PlanOptions
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
    """What this machine does at best: FLOPs a second in matrix products, bytes a second written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Advice:
    """A change of the settings, and the peak of the run with it: with weights in memory, or streamed."""

    change: str
    peak: int
    streamed: bool = False


@dataclass(frozen=True)
class Streamed:
    """A run that streams its blocks: how, in words, and the bytes that a step moves from and to the disk."""

    choice: WayChoice[TextRunPlan]
    words: str
    moved: int

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        way, plan = self.choice.way, self.choice.plan
        how = {"slots": way.slots, "together": way.together, "aside": way.spilled, "moved": self.moved}
        return {"planned": plan.peak, **how, "phases": plan.to_mapping()["phases"]}


@dataclass(frozen=True)
class PlanResult:
    """What a run will take; `least` and `advice` where its budget cannot be kept."""

    config: RunConfig
    planned: TextRunPlan
    precision: Precision
    speed: Speed | None  # None for a CUDA device, whose speed is not estimated
    budget: Budget
    host_memory: str = ""  # what a streamed run on a CUDA device takes of the host's memory, in words
    streamed: Streamed | None = None  # how `lorakeet finetune` keeps a budget that is too small for weights in memory
    least: int | None = None  # the smallest budget that streaming keeps; of the same runs
    advice: tuple[Advice, ...] = ()
    later: tuple[Phase, ...] = ()  # merging and exporting within the budget, or at the least that they take

    @property
    def peak(self) -> int:
        """The most bytes that `lorakeet finetune` will hold with its weights in memory."""
        return self.planned.peak

    @property
    def unpacks_too_much(self) -> bool:
        """Whether a .gguf file is still to be unpacked, and that alone takes more than the budget."""
        first = self.planned.forecast.phases[0]
        return first.name == UNPACK and first.bytes > self.budget.bytes

    @property
    def seconds(self) -> float:
        """The least time of one micro-batch in training: the longer of its arithmetic and its writing."""
        work, speed = self.planned.work, self.speed
        return math.nan if speed is None else max(work.flops / speed.flops, work.written / speed.bytes)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        planned, work = self.planned, self.planned.work
        return {
            "model": self.config.model.path,
            "device": str(self.precision.device),
            "trained_parameters": planned.plan.parameters,
            "micro_batch": {"rows": planned.rows.count, "tokens": planned.rows.tokens},
            "phases": [phase.to_mapping() for phase in planned.forecast.phases],
            "peak": self.peak,
            "budget": self.budget.limit,
            "fits": self.peak <= self.budget.bytes if self.budget else None,
            "streamed": None if self.streamed is None else self.streamed.to_mapping(),
            "streamed_least": self.least,
            "advice": [dataclasses.asdict(item) for item in self.advice],
            "later": [phase.to_mapping() for phase in self.later],
            "speed": {**dataclasses.asdict(work), **self._speed_mapping()},
        }  # fmt: skip

    def _speed_mapping(self) -> dict[str, float]:
        if self.speed is None:
            return {}
        return {
            "flops_per_second": self.speed.flops,
            "bytes_per_second": self.speed.bytes,
            "seconds_at_least": self.seconds,
            "tokens_per_second_at_most": self.planned.rows.tokens / self.seconds,
        }


def plan(config: RunConfig, options: PlanOptions = PlanOptions(), *, console: Console) -> PlanResult | ImagePlanResult:
    """Plans the run of `config` from the model's configuration; needs neither its weights nor rows, and writes nothing.

    `options` win over the settings in `config`. Where memory.budget is set
    and the run would hold more, the result says what would help. Raises ConfigError for a model that is not known.
    """
    config = _with(config, options)
    if config.kind == "image":
        return plan_images(config, console)
    budget, precision = config.memory.limit, precision_of(config)
    if budget and not precision.on_gpu:
        if warning := larger_than_machine(budget):
            console.print(warning, soft_wrap=True)
        return_freed_memory()  # as a run under a budget does
    model_config, files = config_of(config.model, console.print), local_files(config.model.path)
    speed = None if precision.on_gpu else _speed(precision.products)
    run = TextRun(config, Workload(), console.print, (model_config, files))
    planned = run.plan(RESIDENT)
    later: tuple[Phase, ...] = ()
    if budget and not precision.on_gpu:  # merging and exporting are checked on the CPU
        later = later_phases(config, model_config, planned.plan, budget)
    planned = dataclasses.replace(planned, forecast=with_later(planned.forecast, later))
    result = PlanResult(config, _unpacked_first(planned, config, precision), precision, speed, budget, later=later)
    if planned.peak > budget.bytes:
        result = _within_budget(result, run, planned, console)
    show_memory_plan(result, console)
    return result


def _within_budget(result: PlanResult, run: TextRun, planned: TextRunPlan, console: Console) -> PlanResult:
    """`result` with how the run keeps its budget by streaming, or else with what would help."""
    config, precision, choice = result.config, result.precision, choose(run, result.budget)
    if choice.why_no_more:
        console.print(f"finetune refuses: {too_small_text(run, choice, result.budget)}", soft_wrap=True)
        return result
    if choice.fits:
        way, plan = choice.way, choice.plan
        whole = dataclasses.replace(plan, forecast=with_later(plan.forecast, result.later))
        whole = whole if result.unpacks_too_much else _unpacked_first(whole, config, precision)
        streamed = Streamed(dataclasses.replace(choice, plan=whole), run.words(way, plan), bytes_moved(way, plan, run.batches))
        beside = host_memory(run, way, plan)[1] if precision.on_gpu else ""
        return dataclasses.replace(result, streamed=streamed, host_memory=beside)
    model, runtime = run.model, run.runtime(streamed=False)
    forecast = partial(forecast_run, model_config=model[0], runtime=runtime, files=model[1], returning=True)

    def least(other: RunConfig) -> int:
        return TextRun(other, Workload(), console.print, model).plan(LEAST).peak

    advice = _advice(config, precision, planned, forecast, least)
    return dataclasses.replace(result, least=run.plan(LEAST).peak, advice=advice)


def _unpacked_first(planned: TextRunPlan, config: RunConfig, precision: Precision) -> TextRunPlan:
    """`planned` with the phase in which a .gguf file is unpacked, where that is still to be done, which takes none of a card."""
    held = 0 if precision.on_gpu else bytes_to_unpack(config.model)
    if not held:
        return planned
    unpacking = phase_at(UNPACK, Usage(held, {"scratch": held}), resident_bytes(), slack(0))
    return dataclasses.replace(planned, forecast=Forecast((unpacking, *planned.forecast.phases)))


def show_memory_plan(result: PlanResult, console: Console) -> None:
    """The table of phases and kinds, the peak against the budget, what would help, and the bound of speed."""
    planned = result.planned
    rows, work = planned.rows, planned.work
    device = str(result.precision.device) if result.precision.on_gpu else None
    console.print(memory_table(planned.forecast, device))
    trained = f"{planned.plan.parameters:,} trained parameters"
    if result.config.ranks.choose == "auto":
        trained = f"At most {trained}, the ranks those that hold most of all that ranks.choose auto may choose"
    if result.config.ranks.choose == "prune":
        left = final_budget(result.config.ranks, planned.plan)
        cut = "once ranks.choose prune has cut them, and memory and time with them (before, there is no adapter on disk)"
        trained = f"{trained} at first, {left:,} in pairs {cut}"
    console.print(f"{trained}; micro-batches of {rows.count} × {rows.length} tokens, all learnt.", soft_wrap=True)
    console.print(f"Peak of the run: {bytes_text(result.peak)}{_against(result)}.", soft_wrap=True)
    if result.config.train.cuda_graphs:
        also = " finetune refuses it together with memory.budget." if result.budget else ""
        console.print(
            "train.cuda_graphs is true: what recorded passes hold is not counted, and to prove them a micro-batch's activations "
            f"are there twice.{also}", soft_wrap=True,
        )  # fmt: skip
    if result.unpacks_too_much:
        console.print(
            f"finetune refuses: unpacking {result.config.model.path}, which is done once, takes "
            f"{bytes_text(planned.forecast.phases[0].bytes)}. Raise the budget, or run once without it: later runs read the copy "
            "that stays.", soft_wrap=True,
        )  # fmt: skip
    if result.streamed is not None:
        plan, how = result.streamed.choice.plan, result.streamed.words
        console.print(memory_table(plan.forecast, device))
        when = "Once it is unpacked, finetune" if result.unpacks_too_much else "finetune"
        console.print(f"{when} keeps the budget: {bytes_text(plan.peak)} (the table above), {how}.", soft_wrap=True)
        if result.host_memory:
            console.print(result.host_memory, soft_wrap=True)
    if result.least is not None:
        console.print(
            f"finetune refuses: it needs at least {enough_for(min(result.least, result.peak))}, with its blocks streamed from "
            "disk. It would take:", soft_wrap=True,
        )  # fmt: skip
    for item in result.advice:
        fits = "fits" if item.peak <= result.budget.bytes else "is still too much"
        how = "streamed" if item.streamed else "with weights in memory"
        console.print(f"  {item.change}: {bytes_text(item.peak)} {how}, {fits}", soft_wrap=True)
    for phase in result.later:
        if phase.bytes > result.budget.bytes:
            asked = enough_for(phase.bytes).replace(" ", "")
            console.print(f"lorakeet {phase.name} of its adapter will ask for --memory {asked}, streamed.", soft_wrap=True)
    console.print(_speed_text(result, work), soft_wrap=True)


def _speed_text(result: PlanResult, work: Work) -> str:
    speed, results = result.speed, f"{work.flops / 1e9:,.0f} GFLOP"
    if speed is None:
        return (
            f"A micro-batch takes {results} and {work.written / 1e9:.1f} GB of results; how fast a CUDA device is at that is not "
            "estimated. The plan is that of shapes on a CPU sent the way of a CUDA device, with allowances for torch's allocator "
            "and the CUDA context that were not measured on one."
        )
    return (
        f"A micro-batch takes at least {result.seconds:.2g} s here: {results} at {speed.flops / 1e9:,.0f} GFLOP/s, "
        f"{work.written / 1e9:.1f} GB of results at {speed.bytes / 1e9:.1f} GB/s; at most "
        f"{result.planned.rows.tokens / result.seconds:,.0f} tokens a second."
    )


def _against(result: PlanResult) -> str:
    if not result.budget:
        return ""
    left = result.budget.bytes - result.peak
    said = f"{bytes_text(left)} less than" if left >= 0 else f"{bytes_text(-left)} more than"
    return f" with its weights in memory, {said} the budget of {result.budget}"


def _with(config: RunConfig, options: PlanOptions) -> RunConfig:
    """Returns `config` with the settings that `options` override."""
    lora, data, train, model = config.lora, config.data, config.train, config.model
    if options.rank is not None:
        lora = dataclasses.replace(lora, rank=options.rank)
    if (tokens := options.tokens) is not None:
        data, train = dataclasses.replace(data, max_tokens=tokens), dataclasses.replace(train, micro_tokens=tokens)
    if options.quantize is not None:
        model = dataclasses.replace(model, quantize=dataclasses.replace(model.quantize, method=options.quantize))
    return dataclasses.replace(config, lora=lora, data=data, train=train, model=model)


def _advice(
    config: RunConfig,
    precision: Precision,
    planned: TextRunPlan,
    forecast: Callable[..., TextRunPlan],
    streamed_least: Callable[[RunConfig], int],
) -> tuple[Advice, ...]:
    """What would help, the least first. Where the weights alone are more than the budget, other settings help a streamed run:
    these are tried until one fits.
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
    """Settings that take less memory: what to say of each, and the run with it."""
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


def _speed(products: torch.dtype) -> Speed:
    """The best of a few square products and of a few copies: about a tenth of a second."""
    square = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=products)
    source = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(_timed(lambda: torch.mm(square, square)) for _ in range(PROBE_REPEATS))
    copy = min(_timed(lambda: target.copy_(source)) for _ in range(PROBE_REPEATS))
    return Speed(2 * PROBE_SIZE**3 / product, PROBE_BYTES / copy)


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

"""Runs on text: a causal language model trained and evaluated on rows of text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.data.spec import NO_ROWS
from lorakeet.data.template import prompt_format
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.own_metric import load_metric
from lorakeet.evaluate.report.rank_values import RankMap
from lorakeet.evaluate.report.report import Command, Report
from lorakeet.evaluate.values import encode
from lorakeet.evaluate.verdict import noted
from lorakeet.evaluate.wording import bytes_text, duration_text
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.identity import with_note
from lorakeet.kernels.choose import in_words
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.protocol import Situation
from lorakeet.kinds.protocol import NO_BOUND, Advice, Digests, PlanResult, RunKind
from lorakeet.kinds.report import leaks, pruned_map, rank_map
from lorakeet.kinds.terminal import memory_table, show_advice, show_peak, show_targets
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text, text_task
from lorakeet.kinds.text.certify import certify_text, with_own_code
from lorakeet.kinds.text.evaluate import TextEvaluator, require_encodable
from lorakeet.kinds.text.kept_answers import kept_answers
from lorakeet.kinds.text.pairs_on_shapes import pairs_on_shapes
from lorakeet.kinds.text.reply import without_effect
from lorakeet.kinds.text.run_time import Speed, measured_speed, run_time_text
from lorakeet.kinds.text.stacked import check_earlier, earlier_facts, with_earlier
from lorakeet.kinds.text.terminal import show_rows
from lorakeet.kinds.trained_targets import remarks_before, remarks_of_peft
from lorakeet.memory.allocator import return_freed_memory, slack
from lorakeet.memory.budget import Budget, enough_for, larger_than_machine
from lorakeet.memory.forecast import Forecast, Phase, phase_at
from lorakeet.memory.free import fits_now, free_memory
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.remembered import remembered
from lorakeet.memory.usage import Usage
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.files.origin import base_form, packed_folder
from lorakeet.models.files.source import bytes_to_unpack
from lorakeet.models.inject import tokens_of_experts
from lorakeet.models.placement import DTYPES, narrow_for
from lorakeet.models.text.cached_states import cached_states, frozen_depth
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.from_config import config_of, local_files
from lorakeet.models.text.shard import shard_blocks
from lorakeet.planning.check import later_phases, with_later
from lorakeet.planning.encoded_rows import workload_of_files
from lorakeet.planning.fit import WayChoice, choose, fit_free, host_memory, too_small_text
from lorakeet.planning.forecast_text_run import LATER, RowLengths, TextRunPlan, forecast_run
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import SECONDS_BESIDE, planning_within
from lorakeet.planning.text_run import LEAST, TextRun, bytes_moved, precision_of
from lorakeet.planning.unbound_text_run import UnboundTextRun
from lorakeet.quant.packed import PackedBase
from lorakeet.ranks.prune import final_budget
from lorakeet.runs.pruning import pruned_plan
from lorakeet.runs.remarks import remarks_on
from lorakeet.runs.residency import RESIDENT
from lorakeet.runs.run_folder import hashes_of_parts
from lorakeet.train.processes import Processes
from lorakeet.train.run import RunFolder
from lorakeet.train.text.own_code import require_own_code
from lorakeet.train.text.task import TextTask

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


class TextRunKind(RunKind[TextAssembly]):
    """A causal language model on rows of text, with labels or without."""

    several_processes = True
    peft_adapter = True
    tries_rates = True
    searched = True
    hub_task = "text-generation"

    def plan(
        self, config: RunConfig, console: Console, free: Budget = NO_BOUND, watch: Callable[[PlanResult], None] | None = None
    ) -> TextPlanResult:
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

    def usage(self, *, loads: bool) -> tuple[str, ...]:
        by_peft = "from peft import AutoPeftModelForCausalLM", 'model = AutoPeftModelForCausalLM.from_pretrained("THIS FOLDER")'
        return by_peft if loads else ("lorakeet serve --model BASE --adapter NAME=THIS_FOLDER",)

    def without_rows(self, config: RunConfig) -> RunConfig:
        return config.changed(data={"train": NO_ROWS})

    def planned_pairs(self, config: RunConfig, say: Callable[[str], None]) -> tuple[Plan, bool]:
        return pairs_on_shapes(config, say)

    def check(self, config: RunConfig, processes: int) -> None:
        require_encodable(config)
        if config.evaluate.metric is not None:
            load_metric(config.evaluate.metric, outside=Path(config.out))  # raises now rather than after training

    def assemble(
        self, config: RunConfig, console: Console, *, processes: Processes, resumed: RunFolder | None, dry_run: bool
    ) -> TextAssembly:
        setup = assemble_text(config, console, processes)
        remarks = [*remarks_before(setup.plan)]
        if processes.first and setup.residency.unrestricted:  # PEFT itself is not in the plan of its memory
            remarks += remarks_of_peft(setup.text.model.config, setup.plan, type(setup.text.model))
        return dataclasses.replace(setup, remarks=tuple(remarks))

    def summary(self, setup: TextAssembly, *, dry_run: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens_per_epoch": setup.tokens_per_epoch}
        if setup.residency.plan is not None:
            found["memory"] = setup.residency.plan.to_mapping()
        if cuts := setup.cuts:
            found["cuts"] = {str(step): budget for step, budget in cuts.items()}
        if not dry_run:
            return found
        remarks = remarks_on(setup.dataset, setup.config.data, few_shot=setup.config.evaluate.examples > 0)
        said = {"notes": list(setup.dataset.notes), "remarks": encode(remarks), "remedies": encode(setup.dataset.remedies)}
        return {**found, "rank_pattern": dict(setup.config.lora.rank_pattern), **said}

    def show(self, setup: TextAssembly, console: Console, *, dry_run: bool) -> None:
        show_rows(setup, console)
        if ignored := without_effect(setup.config, setup.evaluated[1], setup.dataset.labels):
            console.print(ignored, style="yellow", markup=False, soft_wrap=True)
        if dry_run and (said := run_time_text(setup)):
            console.print(said, soft_wrap=True)

    def new_task(self, setup: TextAssembly) -> TextTask:
        """The task of this kind, with the pairs of the plan added to the model."""
        return text_task(setup)

    def task(self, setup: TextAssembly, run: RunFolder, console: Console) -> TextTask:
        task = self.new_task(setup)
        if setup.config.train.keep_prefix_states:
            frozen_depth(task.text)  # raises before anything is written
        if setup.residency.unrestricted:
            console.print("Comparing the first pass with the model's own code.", soft_wrap=True)
            task.own_code = require_own_code(task.text, task.parameters(), task.train)
        return task

    def frozen_digests(self, setup: TextAssembly) -> Digests:
        return {} if setup.residency.store else frozen_digests(setup.text.model)  # streamed weights are only read

    def identity(self, setup: TextAssembly, digests: Digests) -> dict[str, str | list[str]]:
        config = setup.config
        examples = (*setup.train.examples, *setup.held_out.examples)
        parts: dict[str, Any] = {
            "model settings": config.model.identity(),
            "lora settings": {key: value for key, value in dataclasses.asdict(config.lora).items() if value is not None},
            "tokens of the rows": [[example.key, example.ids.tolist()] for example in examples],
        }
        if config.lora.on_top_of is not None:
            parts["the earlier adapter"] = earlier_facts(config).digest
        if cuts := setup.cuts:  # all that a pruned run takes from the ranks settings
            parts["cuts of the ranks"] = cuts
        alone = config.model if setup.processes.count == 1 else None  # earlier versions refused several CUDA devices
        return {**hashes_of_parts(parts, alone), "files of the base model": fingerprint(setup.text.source)}

    @contextmanager
    def training(self, setup: TextAssembly, task: TextTask, run: RunFolder, console: Console) -> Iterator[None]:
        """Shards the base, and caches hidden states."""
        processes = setup.processes
        if setup.sharded:
            with processes.gathering():
                task.text = shard_blocks(task.text, processes.count, torch.device(setup.config.model.device))
        elif setup.config.train.shard:
            console.print("train.shard has no effect with one process.", soft_wrap=True)
        with _cached_states(setup, task, run, console):
            yield

    def trained(self, setup: TextAssembly, task: TextTask) -> TextAssembly:
        config = setup.config.changed(train={"micro_tokens": task.spec.micro_tokens})  # halved if memory was too small
        tokens = _summed(setup.processes, tokens_of_experts(task.text.model))
        moved = None if setup.moved is None else dataclasses.replace(setup.moved, tokens=tokens)
        halved = task.spec.micro_tokens < setup.config.train.micro_tokens
        setup = dataclasses.replace(
            setup, text=task.text, own_code=task.own_code, config=config, moved=moved, halved=halved
        )
        if task.pruning is None:
            return setup
        return dataclasses.replace(setup, plan=pruned_plan(setup.text, setup.plan), initial_plan=setup.plan)

    def evaluate(self, setup: TextAssembly, run: RunFolder, console: Console) -> Report:
        return self.measured(setup, run, console, TextEvaluator)

    def measured(self, setup: TextAssembly, run: RunFolder, console: Console, make: Callable[..., TextEvaluator]) -> Report:
        """The measured sections of the report, by the evaluator that `make` makes."""
        part, rows = setup.evaluated
        own = None if setup.config.evaluate.metric is None else load_metric(setup.config.evaluate.metric, outside=run.path)
        wide = None if setup.halved else setup.residency
        evaluator = make(setup.config, setup.text, setup.encoder, rows, console, metric=own, residency=wide)
        if not setup.sharded:  # whose processes have to compute the same rows
            evaluator = dataclasses.replace(evaluator, kept=kept_answers(setup.config, setup.text, run.path))
        baseline_rows = [*setup.dataset.train, *(setup.dataset.held_out if part == "test" else ())]
        report = evaluator.report(f"Fine-tuning {setup.name}", baseline_rows=baseline_rows)
        return dataclasses.replace(
            report,
            part=part,
            drift=evaluator.drift(),
            leaks=leaks(setup.dataset.leaks),
            leak_search=setup.dataset.leaks.method(),
            verdict=noted(report.verdict, setup.dataset.leaks.much_dropped()),
            warnings=(*_warnings(setup), *report.warnings),
            remedies=(*setup.dataset.remedies, *report.remedies),
        )

    def certify(self, setup: TextAssembly, run: RunFolder, before: Digests) -> Certificate:
        base = sum(tensor.nbytes for tensor in (*setup.text.model.parameters(), *setup.text.model.buffers()))
        needed = base if setup.residency.plan is not None else base + base // 2  # with what computing takes
        one_base = setup.sharded or setup.residency.one_base or not fits_now(needed, setup.device)
        model, spec = None if one_base else setup.config.model, setup.config.evaluate
        found = certify_text(setup.text, run.adapter, setup.held_out.examples, before=before, model=model, spec=spec)
        if (below := setup.config.lora.on_top_of) is not None:
            stays = check_earlier(read_adapter(run.adapter), read_adapter(Path(below)))
            found = dataclasses.replace(found, checks=(*found.checks, stays))
        return with_note(with_own_code(found, setup.own_code), setup.start_note)

    def model_text(self, setup: TextAssembly) -> str:
        model = setup.config.model
        form = "".join(f", {part}" for part in (base_form(model),) if part)
        text = f"{setup.name}{form}, {model.dtype} weights, {model.products} products, {model.attention} attention"
        native = setup.device.type == "cpu" and setup.text.products == torch.bfloat16 and operators.in_use()
        return text + (", C kernels" if native else "")

    def facts(self, setup: TextAssembly) -> dict[str, str]:
        found, text = super().facts(setup), setup.text
        found["Prompt format"] = prompt_format(setup.dataset.train[0], setup.dataset.labels, text.tokenizer, setup.config.data)
        methods = {str(module.settings["method"]) for module in text.model.modules() if isinstance(module, PackedBase)}
        found["Kernels"] = in_words(Situation(setup.device, text.dtype, text.products), methods)
        if setup.initial_plan is not None:
            found["Ranks"] = f"pruned in training by AdaLoRA's importance, from {setup.initial_plan.summary()}"
        if (below := setup.config.lora.on_top_of) is not None:
            found["Adapter"] = f"the sum of {below}, which stayed as it is, and the pairs trained on top of it"
        if (count := setup.processes.count) > 1:
            base = f"1/{count} of every frozen block" if setup.sharded else "the whole base"
            found["Processes"] = f"{count}, each with {base} and its part of the rows of a step"
        return found

    def rank_map(self, setup: TextAssembly, metrics: Sequence[dict[str, Any]]) -> RankMap | None:
        return rank_map(setup.plan) if setup.initial_plan is None else pruned_map(setup.initial_plan, setup.plan, metrics)

    def next_commands(self, setup: TextAssembly, run: RunFolder) -> tuple[Command, ...]:
        model = setup.config.model
        packed = model.quantize.method
        quantize = f" --quantize {packed}" if packed in ("nf4", "int8") else ""
        path, merged_path, ollama_path = (quote(f"{run.path}{ending}") for ending in ("", "-merged", "-ollama"))
        serving = f"lorakeet serve --model {quote(model.path)}{quantize} --adapter {quote(f'{run.path.name}={run.path}')}"
        merged: tuple[Command, ...] = (
            Command(f"lorakeet merge {path} --out {merged_path}", "fold the adapter into a model that transformers loads"),
            Command(f"lorakeet export {path} --to ollama --out {ollama_path}", "write it for Ollama, checked in llama.cpp"),
            Command(f"lorakeet verify {path}", "compare what these two wrote with the live adapter"),
        )
        if packed == "none" and (stored := packed_folder(Path(model.path).expanduser())):
            into = f"lorakeet merge {path} --into packed --out {merged_path}"
            merged = (Command(into, f"fold the adapter into a model that stays {stored}"),)
        return (
            *merged,
            Command(serving, "answer over HTTP, as OpenAI's API and Ollama's do"),
            Command(f"lorakeet evaluate {path} --data FILE", "measure it on rows of your own"),
        )


KIND = TextRunKind()


def _cached_states(setup: TextAssembly, task: TextTask, run: RunFolder, console: Console) -> AbstractContextManager[Any]:
    """With train.keep_prefix_states: caches the output of the lowest, untrained blocks.

    Of held-out rows, and of training rows where the run has two epochs or more.
    """
    spec = setup.config.train
    if not spec.keep_prefix_states:
        return nullcontext()
    several = spec.total_steps(task.steps_per_epoch) >= 2 * task.steps_per_epoch
    rows = (*task.held_out_rows, *(task.train if several else ()))
    say = partial(console.print, markup=False, soft_wrap=True)
    return cached_states(task.text, rows, folder=run.path, micro_tokens=spec.micro_tokens, say=say)


def _summed(processes: Processes, tokens: dict[str, list[int]]) -> dict[str, list[int]]:
    """The tokens of experts over all processes, each of which saw its rows."""
    return {path: processes.summed(torch.tensor(counts)).tolist() for path, counts in tokens.items()}


def _warnings(setup: TextAssembly) -> Iterator[str]:
    if setup.start_note:
        yield f"The adapter was {setup.start_note}."
    yield from setup.dataset.notes
    yield from filter(None, [setup.dataset.leaks.warning()])
    for name, encoded in setup.encoded.items():
        longer = f"{name} rows were longer than {setup.config.data.max_tokens} tokens and"
        if encoded.truncated:
            yield f"{encoded.truncated} {longer} were shortened."
        if encoded.dropped:
            yield f"{len(encoded.dropped)} {longer} left out."
    if not setup.dataset.test:
        yield "There are no test rows: the checkpoint was chosen on the same held-out rows that it is evaluated on."

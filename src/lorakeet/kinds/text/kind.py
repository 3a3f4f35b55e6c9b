"""Runs on text: a causal language model trained and evaluated on rows of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.own_metric import load_metric
from lorakeet.evaluate.report.rank_values import RankMap
from lorakeet.evaluate.report.report import Command, Report
from lorakeet.evaluate.values import encode
from lorakeet.evaluate.verdict import noted
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.identity import with_note
from lorakeet.kernels.choose import in_words
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.protocol import Situation
from lorakeet.kinds.protocol import NO_BOUND, Digests, PlanResult, RunKind
from lorakeet.kinds.report import leaks, pruned_map, rank_map
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text, text_task
from lorakeet.kinds.text.certify import certify_text, with_own_code
from lorakeet.kinds.text.evaluate import TextEvaluator, require_encodable
from lorakeet.kinds.text.kept_answers import kept_answers
from lorakeet.kinds.text.pairs_on_shapes import pairs_on_shapes
from lorakeet.kinds.text.plan import plan_text
from lorakeet.kinds.text.reply import without_effect
from lorakeet.kinds.text.run_time import run_time_text
from lorakeet.kinds.text.stacked import check_earlier, earlier_facts
from lorakeet.kinds.text.terminal import show_rows
from lorakeet.kinds.trained_targets import remarks_before, remarks_of_peft
from lorakeet.memory.budget import Budget
from lorakeet.memory.free import fits_now
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.files.origin import base_form, packed_folder
from lorakeet.models.inject import tokens_of_experts
from lorakeet.models.text.cached_states import cached_states, frozen_depth
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.shard import shard_blocks
from lorakeet.quant.packed import PackedBase
from lorakeet.runs.pruning import pruned_plan
from lorakeet.runs.remarks import remarks_on
from lorakeet.runs.run_folder import hashes_of_parts
from lorakeet.train.processes import Processes
from lorakeet.train.run import RunFolder
from lorakeet.train.text.own_code import require_own_code
from lorakeet.train.text.task import TextTask


class TextRunKind(RunKind[TextAssembly]):
    """A causal language model on rows of text, with labels or without."""

    several_processes = True
    peft_adapter = True
    tries_rates = True
    hub_task = "text-generation"

    def plan(
        self, config: RunConfig, console: Console, free: Budget = NO_BOUND, watch: Callable[[PlanResult], None] | None = None
    ) -> PlanResult:
        return plan_text(config, console, free, watch)

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

    def evaluator(self, run: RunFolder | None) -> Callable[..., TextEvaluator]:
        return TextEvaluator

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

"""Runs on text: a causal language model trained and evaluated on rows of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.rank_values import RankMap
from lorakeet.evaluate.report.report import Command, Report
from lorakeet.kernels.choose import in_words
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.protocol import Situation
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.files.origin import packed_folder
from lorakeet.models.text.cached_states import cached_states, frozen_depth
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.shard import shard_blocks
from lorakeet.train.processes import Processes
from lorakeet.train.run import RunFolder
from lorakeet.train.text.task import TextTask
from lorakeet.workflows.finetuning.assemble_text import TextAssembly, assemble_text, text_task
from lorakeet.workflows.finetuning.certify_text import certify_text
from lorakeet.workflows.finetuning.cuda_graphs import record_graphs, require_graphable
from lorakeet.workflows.finetuning.evaluate_text import TextEvaluator
from lorakeet.workflows.finetuning.kind import Digests, RunKind
from lorakeet.workflows.finetuning.plan_text import TextPlanResult, plan_text
from lorakeet.workflows.finetuning.report import leaks, pruned_map, rank_map
from lorakeet.workflows.finetuning.terminal import show_rows
from lorakeet.workflows.runs.pruning import pruned_plan
from lorakeet.workflows.runs.run_folder import hashes_of_parts


class TextRunKind(RunKind[TextAssembly]):
    """A causal language model on rows of text, with labels or without."""

    several_processes = True
    tries_rates = True

    def plan(self, config: RunConfig, console: Console) -> TextPlanResult:
        return plan_text(config, console)

    def check(self, config: RunConfig, processes: int) -> None:
        require_graphable(config, processes)

    def assemble(
        self, config: RunConfig, console: Console, *, processes: Processes, resumed: RunFolder | None, dry_run: bool
    ) -> TextAssembly:
        return assemble_text(config, console, processes)

    def summary(self, setup: TextAssembly, *, dry_run: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens_per_epoch": setup.tokens_per_epoch}
        if setup.residency.plan is not None:
            found["memory"] = setup.residency.plan.to_mapping()
        if cuts := setup.cuts:
            found["cuts"] = {str(step): budget for step, budget in cuts.items()}
        return {**found, "rank_pattern": dict(setup.config.lora.rank_pattern)} if dry_run else found

    def show(self, setup: TextAssembly, console: Console, *, dry_run: bool) -> None:
        show_rows(setup, console)

    def task(self, setup: TextAssembly, run: RunFolder, console: Console) -> TextTask:
        task = text_task(setup)
        if setup.config.train.keep_prefix_states:
            frozen_depth(task.text)  # raises before anything is written
        record_graphs(task.text, task, console)
        return task

    def frozen_digests(self, setup: TextAssembly) -> Digests:
        return {} if setup.residency.store else frozen_digests(setup.text.model)  # streamed weights are only read

    def identity(self, setup: TextAssembly, digests: Digests) -> dict[str, str | list[str]]:
        config = setup.config
        examples = (*setup.train.examples, *setup.held_out.examples)
        parts: dict[str, Any] = {
            "model settings": config.model.identity(),
            "lora settings": dataclasses.asdict(config.lora),
            "tokens of the rows": [[example.key, example.ids.tolist()] for example in examples],
        }
        if cuts := setup.cuts:  # all that a pruned run takes from the ranks settings
            parts["cuts of the ranks"] = cuts
        alone = config.model if setup.processes.count == 1 else None  # earlier versions refused several CUDA devices
        return {**hashes_of_parts(parts, alone), "files of the base model": fingerprint(setup.text.source)}

    @contextmanager
    def training(self, setup: TextAssembly, task: TextTask, run: RunFolder, console: Console) -> Iterator[None]:
        """Shards the base, caches hidden states, and frees CUDA graphs at the end, before the certificate's second model."""
        processes = setup.processes
        if setup.sharded:
            with processes.gathering():
                task.text = shard_blocks(task.text, processes.count, torch.device(setup.config.model.device))
        elif setup.config.train.shard:
            console.print("train.shard has no effect with one process.", soft_wrap=True)
        try:
            with _cached_states(setup, task, run, console):
                yield
        finally:
            task.replayed = None

    def trained(self, setup: TextAssembly, task: TextTask) -> TextAssembly:
        setup = dataclasses.replace(setup, text=task.text)
        if task.pruning is None:
            return setup
        return dataclasses.replace(setup, plan=pruned_plan(setup.text, setup.plan), initial_plan=setup.plan)

    def evaluate(self, setup: TextAssembly, run: RunFolder, console: Console) -> Report:
        part, rows = setup.evaluated
        evaluator = TextEvaluator(setup.config, setup.text, setup.encoder, rows, console)
        baseline_rows = [*setup.dataset.train, *(setup.dataset.held_out if part == "test" else ())]
        report = evaluator.report(f"Fine-tuning {setup.name}", baseline_rows=baseline_rows)
        return dataclasses.replace(
            report,
            drift=evaluator.drift(),
            leaks=leaks(setup.dataset.leaks),
            leak_search=setup.dataset.leaks.method(),
            warnings=(*_warnings(setup), *report.warnings),
        )

    def certify(self, setup: TextAssembly, run: RunFolder, before: Digests) -> Certificate:
        one_base = setup.sharded or bool(setup.residency.budget)
        return certify_text(
            setup.text,
            run.adapter,
            setup.held_out.examples,
            before=before,
            model=None if one_base else setup.config.model,
            spec=setup.config.evaluate,
        )

    def model_text(self, setup: TextAssembly) -> str:
        model = setup.config.model
        text = f"{setup.name}, {model.dtype} weights, {model.products} products, {model.attention} attention"
        native = setup.device.type == "cpu" and setup.text.products == torch.bfloat16 and operators.in_use()
        return text + (", C kernels" if native else "")

    def facts(self, setup: TextAssembly) -> dict[str, str]:
        found, text = super().facts(setup), setup.text
        found["Kernels"] = in_words(Situation(setup.device, text.dtype, text.products, text.kernels is not None))
        if setup.initial_plan is not None:
            found["Ranks"] = f"pruned in training by AdaLoRA's importance, from {setup.initial_plan.summary()}"
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


@contextmanager
def _cached_states(setup: TextAssembly, task: TextTask, run: RunFolder, console: Console) -> Iterator[None]:
    """With train.keep_prefix_states: caches the output of the lowest, untrained blocks.

    Of held-out rows, and of training rows where the run has two epochs or more.
    """
    spec = setup.config.train
    if not spec.keep_prefix_states:
        yield
        return
    several = spec.total_steps(task.steps_per_epoch) >= 2 * task.steps_per_epoch
    rows = (*task.held_out_rows, *(task.train if several else ()))
    say = partial(console.print, markup=False, soft_wrap=True)
    with cached_states(task.text, rows, folder=run.path, micro_tokens=spec.micro_tokens, say=say):
        yield


def _warnings(setup: TextAssembly) -> Iterator[str]:
    for name, encoded in setup.encoded.items():
        longer = f"{name} rows were longer than {setup.config.data.max_tokens} tokens and"
        if encoded.truncated:
            yield f"{encoded.truncated} {longer} were shortened."
        if encoded.dropped:
            yield f"{len(encoded.dropped)} {longer} left out."
    if not setup.dataset.test:
        yield "There are no test rows: the checkpoint was chosen on the same held-out rows that it is evaluated on."

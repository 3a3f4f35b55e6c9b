"""Runs on preferences: which of two answers a model prefers (dpo, ipo, cdpo, orpo, simpo), or whether one is wanted (kto).

A kind of its own over a text model: its rows have two answers, its loss compares them with a reference, and its report says how
often the chosen answer is preferred.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Encoded
from lorakeet.data.rows import Row
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, Check, tolerance_check
from lorakeet.evaluate.report.report import Report
from lorakeet.formats.files.digest import sha256_of
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.generate.score import row_losses
from lorakeet.train.checkpoint import found as checkpoints
from lorakeet.train.preference_spec import KTO, START
from lorakeet.train.run import RunFolder
from lorakeet.train.text.preference_task import PreferenceTask, Reference, needs_reference
from lorakeet.train.text.reference import digest_of, read_reference, save_reference
from lorakeet.train.text.task import TextTask
from lorakeet.workflows.finetuning.assemble_text import TextAssembly, text_task
from lorakeet.workflows.finetuning.evaluate_preference import (
    PreferenceEvaluator,
    as_reference,
    reference_adapter,
    reference_path,
)
from lorakeet.workflows.finetuning.kind import Digests
from lorakeet.workflows.finetuning.text import TextRunKind
from lorakeet.workflows.runs.run_folder import hashes_of_parts

STARTS = {"float32": 1e-3}  # nats a token by which the model may differ from its reference before the first step, by dtype
STARTS_ROUNDED = 0.1  # the same for narrower weights
FIRST = 16  # held-out pairs on which that is measured


class PreferenceRunKind(TextRunKind):
    """Fine-tunes an adapter of a causal language model on preferences."""

    tries_rates = False  # the trial trains with the loss of sft

    def check(self, config: RunConfig, processes: int) -> None:
        super().check(config, processes)
        if config.train.shard and processes > 1:
            raise ConfigError(f"train.shard is true, but train.objective is {config.train.objective}. Leave one of them out.")
        if config.evaluate.encoder is not None:
            raise ConfigError("evaluate.encoder is for rows with labels, but train.objective compares answers. Leave it out.")
        if (path := reference_path(config)) is not None and not path.exists():
            raise ConfigError(f"The reference {path} does not exist. Name a run or adapter folder with --train.reference.")
        reference_adapter(config)  # raises now if it cannot be read

    def new_task(self, setup: TextAssembly) -> PreferenceTask:
        config = setup.config
        desirable: tuple[list[bool], list[bool]] = ([], [])
        if config.train.objective == KTO:
            desirable = (_desirable(setup.dataset.train, setup.train), _desirable(setup.dataset.held_out, setup.held_out))
        make = partial(PreferenceTask, preference=config.preference.resolved(config.train.objective), desirable=desirable)
        return cast(PreferenceTask, text_task(setup, make=make))

    def identity(self, setup: TextAssembly, digests: Digests) -> dict[str, str | list[str]]:
        config = setup.config
        more = hashes_of_parts({"preference settings": dataclasses.asdict(config.preference.resolved(config.train.objective))})
        return {**super().identity(setup, digests), **more}

    @contextmanager
    def training(self, setup: TextAssembly, task: TextTask, run: RunFolder, console: Console) -> Iterator[None]:
        """Computes the reference before the first step, or reads that of a run that is resumed."""
        with super().training(setup, task, run, console):
            if isinstance(task, PreferenceTask) and needs_reference(task.objective):
                task.reference = self._reference(setup, task, run, console)
            yield

    def _reference(self, setup: TextAssembly, task: PreferenceTask, run: RunFolder, console: Console) -> Reference:
        digest = _digest(setup)
        if run.reference.is_file() or next(iter(checkpoints(run.checkpoints)), None) is not None:
            return setup.processes.from_first(lambda: read_reference(run.reference, digest))
        held = reference_adapter(setup.config)
        console.print(f"Computing the reference, {_name(setup.config)}: log-probabilities of all answers, once.", soft_wrap=True)
        with as_reference(task.text, held, task.name):
            train, held_out = (task.log_probs(rows)[0] for rows in (task.train, task.held_out_rows))
        start = None
        if setup.config.train.reference == START:
            first = min(2 * FIRST, len(task.held_out_rows))
            now, tokens = task.log_probs(task.held_out_rows[:first])
            start = float(np.abs((now - held_out[:first]) / tokens).max())
            if not start <= _most(setup):
                raise VerificationFailed(
                    f"Before the first step the model differs from its reference by {start:.3g} nats a token, where "
                    f"{_most(setup):g} is allowed. Take lora.start kaiming, or model.dtype float32."
                )
        found = Reference(train, held_out, task.spec.micro_tokens, start)
        setup.processes.from_first(lambda: save_reference(run.reference, found, digest))
        return found

    def trained(self, setup: TextAssembly, task: TextTask) -> TextAssembly:
        reference = task.reference if isinstance(task, PreferenceTask) else None
        return dataclasses.replace(super().trained(setup, task), reference=reference)

    def evaluate(self, setup: TextAssembly, run: RunFolder, console: Console) -> Report:
        return self.measured(setup, run, console, PreferenceEvaluator)

    def certify(self, setup: TextAssembly, run: RunFolder, before: Digests) -> Certificate:
        certificate, reference = super().certify(setup, run, before), setup.reference
        if reference is None:
            return certificate
        checks = [_unchanged(setup, reference)]
        if reference.start is not None:
            sides = "the model before its first step", "its reference"
            measured, most = {"difference": reference.start}, {"difference": _most(setup)}
            count = min(2 * FIRST, len(reference.held_out))
            checks.append(tolerance_check("start", measured, tolerance=most, between=sides, n=count))
        return dataclasses.replace(certificate, checks=(*certificate.checks, *checks))

    def facts(self, setup: TextAssembly) -> dict[str, str]:
        config = setup.config
        spec = config.preference.resolved(config.train.objective)
        settings = ", ".join(f"{name} {value:g}" for name, value in vars(spec).items() if value and not isinstance(value, bool))
        return {**super().facts(setup), "Objective": f"{config.train.objective} ({settings})", "Reference": _name(config)}


KIND = PreferenceRunKind()


def _desirable(rows: Sequence[Row], encoded: Encoded) -> list[bool]:
    """Whether the answer of each row that was not left out is wanted."""
    left_out = set(encoded.dropped)
    return [bool(row.desirable) for row in rows if row.source not in left_out]


def _name(config: RunConfig) -> str:
    if not needs_reference(config.train.objective):
        return f"none: {config.train.objective} has no reference"
    path = reference_path(config)
    return "the base with the adapter off" if path is None else f"the adapter {path}"


def _most(setup: TextAssembly) -> float:
    return STARTS.get(setup.config.model.dtype, STARTS_ROUNDED)


def _digest(setup: TextAssembly) -> str:
    """Of what the reference is computed from: the files of the model, the adapter, and the rows' tokens."""
    adapter = reference_path(setup.config)
    files = "" if adapter is None else sha256_of(*sorted(adapter.rglob("*.safetensors")) if adapter.is_dir() else [adapter])
    rows = (setup.train.examples, setup.held_out.examples)
    return digest_of(rows, fingerprint(setup.text.source), str(setup.config.model.identity()), files)


def _unchanged(setup: TextAssembly, reference: Reference) -> Check:
    """The check that the reference still computes what it did before training, to the bit, on the held-out answers."""
    text, name = setup.text, "default"
    with as_reference(text, reference_adapter(setup.config), name):
        losses, _ = row_losses(
            text, setup.held_out.examples, micro_tokens=reference.micro_tokens, chunk=setup.config.train.head_chunk
        )
    changed = int(np.sum(-losses != reference.held_out))
    most = float(np.abs(-losses - reference.held_out).max(initial=0.0))
    return tolerance_check(
        "reference", {"changed_log_probs": float(changed)}, tolerance={"changed_log_probs": 0.0},
        between=("log-probabilities of the reference after training", "those that it was trained with"), n=len(losses),
        detail=f"The largest difference is {most:.3g} nats." if changed else "",
    )  # fmt: skip

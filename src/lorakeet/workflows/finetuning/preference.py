"""Runs on preferences: which of two answers a model prefers (dpo, ipo, cdpo, orpo, simpo), or whether one is wanted (kto).

A kind of its own over a text model: its rows have two answers, its loss compares them with a reference, and its report says how
often the chosen answer is preferred.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

APART = {"float32": 1e-3}  # nats a token by which pairs that add nothing may change the base's log-probabilities, by dtype
APART_ROUNDED = 0.1  # the same for narrower weights; SmolLM2 in bf16 has 0.02


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
        """The log-probabilities of all answers, computed now or read from a run that is resumed.

        A model that is its own reference computes it with its pairs as they start. Pairs whose B is 0 add nothing, but take
        another path through the kernels than no pairs, and in bf16 each path rounds in its own way.
        """
        digest, held = _digest(setup), reference_adapter(setup.config)
        own = setup.config.train.reference == START
        adapter = task.adapter() if own else held
        if run.reference.is_file() or next(iter(checkpoints(run.checkpoints)), None) is not None:
            found = setup.processes.from_first(lambda: read_reference(run.reference, digest))
            return dataclasses.replace(found, adapter=adapter)
        console.print(f"Computing the reference, {_name(setup.config)}: log-probabilities of all answers, once.", soft_wrap=True)
        with nullcontext() if own else as_reference(task.text, held, task.name):
            train, (held_out, tokens) = task.log_probs(task.train)[0], task.log_probs(task.held_out_rows)
        apart = None
        if own and held is None:
            with as_reference(task.text, None, task.name):
                base, _ = task.log_probs(task.held_out_rows)
            apart = float(np.abs((held_out - base) / tokens).mean())
            if not apart <= _most(setup):
                raise VerificationFailed(
                    f"Before the first step the model differs from its base by {apart:.3g} nats a token, where {_most(setup):g} "
                    "is allowed. Take lora.start kaiming, or model.dtype float32."
                )
        found = Reference(train, held_out, task.spec.micro_tokens, apart, adapter)
        setup.processes.from_first(lambda: save_reference(run.reference, found, digest))
        return found

    def trained(self, setup: TextAssembly, task: TextTask) -> TextAssembly:
        reference = task.reference if isinstance(task, PreferenceTask) else None
        return dataclasses.replace(super().trained(setup, task), reference=reference)

    def evaluate(self, setup: TextAssembly, run: RunFolder, console: Console) -> Report:
        held = None if setup.reference is None else setup.reference.adapter
        return self.measured(setup, run, console, partial(PreferenceEvaluator, reference=held))

    def certify(self, setup: TextAssembly, run: RunFolder, before: Digests) -> Certificate:
        certificate, reference = super().certify(setup, run, before), setup.reference
        if reference is None:
            return certificate
        checks = [_unchanged(setup, reference)]
        if reference.from_base is not None:
            sides = "the reference, by the pairs as they started", "the base with the adapter off"
            measured, most = {"mean_difference": reference.from_base}, {"mean_difference": _most(setup)}
            count = len(reference.held_out)
            checks.append(tolerance_check("reference is the base", measured, tolerance=most, between=sides, n=count))
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
    return APART.get(setup.config.model.dtype, APART_ROUNDED)


def _digest(setup: TextAssembly) -> str:
    """Of what the reference is computed from: the files of the model, the adapter, and the rows' tokens."""
    adapter = reference_path(setup.config)
    files = "" if adapter is None else sha256_of(*sorted(adapter.rglob("*.safetensors")) if adapter.is_dir() else [adapter])
    rows = (setup.train.examples, setup.held_out.examples)
    return digest_of(rows, fingerprint(setup.text.source), str(setup.config.model.identity()), files)


def _unchanged(setup: TextAssembly, reference: Reference) -> Check:
    """The check that the reference still computes what it did before training, to the bit, on the held-out answers."""
    text, name = setup.text, "default"
    with as_reference(text, reference.adapter, name):
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

"""Runs on preferences: which of two answers a model prefers (dpo, ipo, cdpo, orpo, simpo), or whether one is wanted (kto).

A kind of its own over a text model: its rows have two answers, its loss compares them with a reference, and its report says how
often the chosen answer is preferred.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import cast

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Encoded
from lorakeet.data.rows import Row
from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, Check, tolerance_check
from lorakeet.evaluate.report.report import Report
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.peft import peft
from lorakeet.kinds.preference.evaluate import (
    PreferenceEvaluator,
    as_reference,
    begins_at_reference,
    reference_adapter,
    reference_path,
)
from lorakeet.kinds.preference.reference import digest_of, read_reference, save_reference
from lorakeet.kinds.preference.spec import KTO, needs_reference, preference_of, reference_of
from lorakeet.kinds.preference.task import Floats, PreferenceTask, Reference
from lorakeet.kinds.protocol import Digests
from lorakeet.kinds.text.assemble import TextAssembly, text_task
from lorakeet.kinds.text.continued import require_same_base
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.kind import TextRunKind
from lorakeet.kinds.text.stacked import adapter_digest
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.generate.score import row_losses
from lorakeet.registry import START
from lorakeet.runs.output_paths import writing
from lorakeet.runs.run_folder import hashes_of_parts
from lorakeet.train import durable
from lorakeet.train.checkpoint import found as checkpoints
from lorakeet.train.run import RunFolder
from lorakeet.train.text.task import TextTask

APART = {"float32": 1e-3}  # nats a token by which pairs that add nothing may change the base's log-probabilities, by dtype
APART_ROUNDED = 0.1  # the same for narrower weights; SmolLM2 in bf16 has 0.02
SAMPLED = 32  # training answers of which the certificate computes the reference again


class PreferenceRunKind(TextRunKind):
    """Fine-tunes an adapter of a causal language model on preferences."""

    tries_rates = False  # few steps on pairs show which rate goes further, not which prefers better

    def check(self, config: RunConfig, processes: int) -> None:
        super().check(config, processes)
        if config.train.shard and processes > 1:
            raise ConfigError(f"train.shard is true, but train.objective is {config.train.objective}. Leave one of them out.")
        if config.evaluate.encoder is not None:
            raise ConfigError("evaluate.encoder is for rows with labels, but train.objective compares answers. Leave it out.")
        if (path := reference_path(config)) is not None and not path.exists():
            raise ConfigError(f"The reference {path} does not exist. Name a run or adapter folder with --train.reference.")
        if reference_of(config.train) != START:  # the adapter that training starts with is read for its ranks before the model is
            reference_adapter(config)  # raises now if it cannot be read

    def new_task(self, setup: TextAssembly) -> PreferenceTask:
        config = setup.config
        desirable: tuple[list[bool], list[bool]] = ([], [])
        if config.train.objective == KTO:
            part, rows = setup.evaluated
            wanted = _desirable(rows, setup.encoded[part])
            if not any(wanted):
                longer = f" that fits data.max_tokens {config.data.max_tokens}" * any(row.desirable for row in rows)
                raise DataError(
                    f"None of the {len(rows)} {part} rows has an answer that is wanted{longer}. Add some of label true."
                )
            desirable = (_desirable(setup.dataset.train, setup.train), _desirable(setup.dataset.held_out, setup.held_out))
        make = partial(PreferenceTask, preference=preference_of(config), desirable=desirable)
        return cast(PreferenceTask, text_task(setup, make=make))

    def identity(self, setup: TextAssembly, digests: Digests) -> dict[str, str | list[str]]:
        config = setup.config
        more = hashes_of_parts({"preference settings": dataclasses.asdict(preference_of(config))})
        return {**super().identity(setup, digests), **more}

    @contextmanager
    def training(self, setup: TextAssembly, task: TextTask, run: RunFolder, console: Console) -> Iterator[None]:
        """Computes the reference before the first step, or reads that of a run that is resumed."""
        if isinstance(task, PreferenceTask) and needs_reference(task.objective):  # before states are cached: another path rounds
            task.reference = self._reference(setup, task, run, console)
            if begins_at_reference(setup.config) and not setup.config.lora.dropout:
                task.start_within = largest_difference(setup)
        with super().training(setup, task, run, console):
            yield

    def _reference(self, setup: TextAssembly, task: PreferenceTask, run: RunFolder, console: Console) -> Reference:
        """The log-probabilities of all answers, computed now or read from a run that is resumed.

        A model that is its own reference computes it with its pairs as they start. Pairs whose B is 0 add nothing, but take
        another path through the kernels than no pairs, and in bf16 each path rounds in its own way.
        """
        first = setup.processes.from_first
        own, held = reference_of(setup.config.train) == START, first(lambda: _kept_reference(setup, run))
        adapter = task.adapter() if own else held
        digest = _digest(setup, held)
        if run.reference.is_file() or next(iter(checkpoints(run.checkpoints)), None) is not None:
            return dataclasses.replace(first(lambda: read_reference(run.reference, digest)), adapter=adapter)
        console.print(f"Computing the reference, {_name(setup.config)}: log-probabilities of all answers, once.", soft_wrap=True)
        with nullcontext() if own else as_reference(task.text, held, task.name):
            train = task.log_probs(task.train)[0]
            held_out, tokens = first(lambda: _held_out_log_probs(setup, task.spec.micro_tokens))
        _require_finite(train, held_out)
        apart = None
        if own and held is None:
            with as_reference(task.text, None, task.name):
                base, _ = first(lambda: _held_out_log_probs(setup, task.spec.micro_tokens))
            apart = float(np.abs((held_out - base) / tokens).mean())
            most = largest_difference(setup)
            if not apart <= most:
                raise VerificationFailed(
                    f"Before the first step the model differs from its base by {apart:.3g} nats a token, where {most:g} "
                    "is allowed. Take lora.start kaiming, or model.dtype float32."
                )
        found = Reference(train, held_out, task.spec.micro_tokens, apart, adapter, fresh=True)
        first(lambda: _save(run, found, digest, held))
        return found

    def trained(self, setup: TextAssembly, task: TextTask) -> TextAssembly:
        reference = task.reference if isinstance(task, PreferenceTask) else None
        return dataclasses.replace(super().trained(setup, task), reference=reference)

    def evaluate(self, setup: TextAssembly, run: RunFolder, console: Console) -> Report:
        held = None if setup.reference is None else setup.reference.adapter
        return self.measured(setup, run, console, partial(PreferenceEvaluator, reference=held))

    def evaluator(self, run: RunFolder | None) -> Callable[..., TextEvaluator]:
        kept = None if run is None or not run.reference_adapter.is_dir() else read_adapter(run.reference_adapter)
        return partial(PreferenceEvaluator, reference=kept)

    def certify(self, setup: TextAssembly, run: RunFolder, before: Digests) -> Certificate:
        certificate, reference = super().certify(setup, run, before), setup.reference
        if reference is None:
            return certificate
        checks = [_unchanged(setup, reference), _of_training_rows(setup, reference)]
        if reference.from_base is not None:
            sides = "the reference, by the pairs as they started", "the base with the adapter off"
            measured, most = {"mean_difference": reference.from_base}, {"mean_difference": largest_difference(setup)}
            count = len(reference.held_out)
            checks.append(tolerance_check("reference is the base", measured, tolerance=most, between=sides, n=count))
        return dataclasses.replace(certificate, checks=(*certificate.checks, *checks))

    def facts(self, setup: TextAssembly) -> dict[str, str]:
        config = setup.config
        spec = preference_of(config)
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


def _require_finite(*parts: Floats) -> None:
    """Raises VerificationFailed if a log-probability of the reference is none: every loss would be NaN."""
    if wrong := sum(int((~np.isfinite(part)).sum()) for part in parts):
        raise VerificationFailed(
            f"The reference's log-probabilities of {wrong} of {sum(map(len, parts))} answers are NaN or infinite, so nothing can "
            "be compared with them. Take model.dtype float32, or another model."
        )


def largest_difference(setup: TextAssembly) -> float:
    """By how many nats a token pairs that add nothing may change what the base computes, in the dtype of the run."""
    return APART.get(setup.config.model.dtype, APART_ROUNDED)


def _kept_reference(setup: TextAssembly, run: RunFolder) -> Adapter | None:
    """The adapter that is the reference: the copy in the run folder, or else the one that the settings name, of the same base."""
    if run.reference_adapter.is_dir():
        return read_adapter(run.reference_adapter)
    path, held = reference_path(setup.config), reference_adapter(setup.config)
    if path is not None and held is not None:
        require_same_base(path, held, setup.text, setup.config)
    return held


def _save(run: RunFolder, reference: Reference, digest: str, held: Adapter | None) -> None:
    """Writes the log-probabilities, and a copy of the adapter that is the reference: the original may change or move."""
    with writing(f"The reference in {run.path}", f"Free some space, then: {run.resume_command}"):
        if held is not None:
            with durable.new_folder(run.reference_adapter) as folder:
                peft.write(held, folder)
        save_reference(run.reference, reference, digest)


def _held_out_log_probs(setup: TextAssembly, micro_tokens: int) -> tuple[Floats, Floats]:
    """log p of each held-out answer by the model as it is, and its tokens, in one process, even where several train."""
    losses, tokens = row_losses(
        setup.text, setup.held_out.examples, micro_tokens=micro_tokens, chunk=setup.config.train.head_chunk
    )
    return -losses, tokens


def _digest(setup: TextAssembly, held: Adapter | None) -> str:
    """Of what the reference is computed from: the files of the model, the adapter as a value, and the rows' tokens."""
    rows = (setup.train.examples, setup.held_out.examples)
    return digest_of(rows, fingerprint(setup.text.source), str(setup.config.model.identity()), adapter_digest(held))


def _unchanged(setup: TextAssembly, reference: Reference) -> Check:
    """The check that the reference still computes what it did before training, on the held-out answers.

    To the bit, unless the run was resumed: another process may have other threads and kernels.
    """
    with as_reference(setup.text, reference.adapter, "default"):
        now, tokens = _held_out_log_probs(setup, reference.micro_tokens)
    most = float((np.abs(now - reference.held_out) / tokens).max(initial=0.0))
    return tolerance_check(
        "reference", {"difference": most}, tolerance={"difference": 0.0 if reference.fresh else largest_difference(setup)},
        between=("log-probabilities of the reference after training", "those that it was trained with"), n=len(now),
    )  # fmt: skip


def _of_training_rows(setup: TextAssembly, reference: Reference) -> Check:
    """The check that what training compared with is the reference of its own rows, on SAMPLED of them.

    Within rounding, since they were cut into other micro-batches then.
    """
    rows = len(setup.train.examples)
    some = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED), dtype=np.int64))
    with as_reference(setup.text, reference.adapter, "default"):
        losses, tokens = row_losses(
            setup.text, [setup.train.examples[number] for number in some], micro_tokens=reference.micro_tokens,
            chunk=setup.config.train.head_chunk,
        )  # fmt: skip
    return tolerance_check(
        "reference of training rows", {"mean_difference": float(np.abs((-losses - reference.train[some]) / tokens).mean())},
        tolerance={"mean_difference": largest_difference(setup)},
        between=("log-probabilities of the reference after training", "those of the rows that it was trained with"), n=len(some),
    )  # fmt: skip

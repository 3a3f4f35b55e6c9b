"""Evaluates a preference run: which answer of each pair adapter, base, reference and simple baselines prefer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Example
from lorakeet.data.pairs import encode_pair
from lorakeet.data.rows import Row, row_groups
from lorakeet.errors import DataError
from lorakeet.evaluate.baselines import MAJORITY
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.preferences import PairPreferences, longer_answer, tfidf_difference
from lorakeet.evaluate.report.compose import language_report
from lorakeet.evaluate.report.compose_preference import PreferenceScores, with_preferences
from lorakeet.evaluate.report.report import Report
from lorakeet.formats.detect import read_adapter
from lorakeet.models.generate.score import row_losses
from lorakeet.models.inject import activate, adapter_of, eject
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.model import TextModel
from lorakeet.train.preference_spec import BASE, KTO, START, WITHOUT_REFERENCE, PreferenceSpec
from lorakeet.train.progress import counted
from lorakeet.train.text.preference_loss import log_ratio_gap
from lorakeet.train.text.preference_task import Floats, pair_scores
from lorakeet.workflows.finetuning.evaluate_text import TextEvaluator
from lorakeet.workflows.finetuning.reply import ADAPTER, Replier
from lorakeet.workflows.finetuning.reply import BASE as BASE_SYSTEM

REFERENCE = "reference"  # its name on the model, and in reports


def reference_path(config: RunConfig) -> Path | None:
    """The adapter that is the reference; None where it is the base, or the objective has none."""
    if config.train.objective in WITHOUT_REFERENCE or config.train.reference == BASE:
        return None
    if config.train.reference == START:
        return None if config.lora.continue_from is None else Path(config.lora.continue_from)
    return Path(config.train.reference)


def reference_adapter(config: RunConfig) -> Adapter | None:
    """That adapter; None where there is none. Raises DataError if it cannot be read."""
    path = reference_path(config)
    return None if path is None else read_adapter(path)


@contextmanager
def as_reference(text: TextModel, adapter: Adapter | None, name: str) -> Iterator[None]:
    """A context in which `text` computes the reference: with the adapter off, or with `adapter` in place of `name`."""
    if adapter is None:
        activate(text.model, None)
    else:
        add_adapter(text, adapter, REFERENCE)
        activate(text.model, REFERENCE)
    try:
        yield
    finally:
        if adapter is not None:
            eject(text.model, REFERENCE)
        activate(text.model, name)


@dataclass(frozen=True)
class PreferenceEvaluator(TextEvaluator):
    """Measures `text` on rows with two answers, or of kto with a verdict on one.

    `reference` is what the log-probabilities are compared with; None: the adapter that the settings name, or else the base.
    """

    reference: Adapter | None = None

    def fitting(self) -> list[Row]:
        if self._rated:
            return super().fitting()
        return [row for row in self.rows if encode_pair(row, self.encoder) is not None]

    @property
    def _rated(self) -> bool:
        return self.config.train.objective == KTO

    def report(self, title: str, *, baseline_rows: Sequence[Row]) -> Report:
        """Loss and replies of the wanted answers, as for other text, with the preferences of every system before them."""
        rows, spec = self.fitting(), self.config.evaluate
        if not rows:
            raise DataError("There are no rows to evaluate on. Name a file with rows, or raise data.max_tokens.")
        examples = self._examples(rows)
        adapter, tokens = self._log_probs(examples, ADAPTER)
        base, _ = self._log_probs(examples, BASE_SYSTEM)
        reference, named = base, reference_path(self.config) is not None
        if self.config.train.objective not in WITHOUT_REFERENCE:
            with as_reference(self.text, self._reference_adapter(), self.name):
                reference, _ = self._scored(examples, REFERENCE)
        step = 1 if self._rated else 2
        wanted = [index for index, row in enumerate(rows) if row.desirable is not False]
        chosen = [rows[index] for index in wanted]
        if not chosen:
            raise DataError("No evaluated row has an answer that is wanted. Name a file with some.")
        losses = [
            RowLosses(name, -sums[::step][wanted], tokens[::step][wanted].astype(np.int64), row_groups(chosen))
            for name, sums in ((ADAPTER, adapter), (BASE_SYSTEM, base))
        ]
        replier = Replier(self.config, self.text, self.encoder, self.console, self.name, self.metric)
        report = language_report(
            title, adapter=losses[0], base=losses[1], texts=[_text(row, supervised=False) for row in chosen],
            truths=[_text(row, supervised=True) for row in chosen], sources=[row.source for row in chosen], spec=spec,
            answered=replier.answered(chosen, [row for row in baseline_rows if row.desirable is not False]),
        )  # fmt: skip
        found = _Scored(self.config, rows, adapter, base, reference, tokens, named)
        scores = found.rated(baseline_rows) if self._rated else found.pairs(baseline_rows)
        left_out = len(self.rows) - len(rows)
        said = [f"{left_out} rows longer than {self.encoder.spec.max_tokens} tokens were left out of the evaluation."]
        report = with_preferences(report, scores, spec)
        return replace(report, warnings=(*said[: bool(left_out)], *report.warnings))

    def _reference_adapter(self) -> Adapter | None:
        """The reference; for the base pairs that add nothing, which take the adapter's path through the kernels."""
        held = self.reference or reference_adapter(self.config)
        if held is not None or self.config.train.reference == BASE:
            return held
        live = adapter_of(self.text.model, self.name)
        if live.extras or live.token_rows or any(pair.magnitude is not None for pair in live.pairs.values()):
            return None
        return replace(live, pairs={path: replace(pair, B=torch.zeros_like(pair.B)) for path, pair in live.pairs.items()})

    def _examples(self, rows: Sequence[Row]) -> list[Example]:
        if self._rated:
            return [example for row in rows if (example := self.encoder.encode(row)) is not None]
        return [example for row in rows for example in encode_pair(row, self.encoder) or ()]

    def _log_probs(self, examples: Sequence[Example], system: str) -> tuple[Floats, Floats]:
        activate(self.text.model, None if system == BASE_SYSTEM else self.name)
        return self._scored(examples, system)

    def _scored(self, examples: Sequence[Example], system: str) -> tuple[Floats, Floats]:
        """log p of each answer (answers,) by the model as it is, and its tokens (answers,)."""
        with counted(self.console, f"{system} reads answers", len(examples)) as advance:
            sums, tokens = row_losses(self.text, examples, micro_tokens=self.config.train.micro_tokens, progress=advance)
        return -sums, tokens


def evaluator_for(config: RunConfig) -> type[TextEvaluator]:
    """The evaluator of runs with this objective."""
    return TextEvaluator if config.train.objective == "sft" else PreferenceEvaluator


@dataclass(frozen=True, eq=False)
class _Scored:
    """The log-probabilities of the answers of `rows` by each model, in pairs or one a row, and the answers' tokens."""

    config: RunConfig
    rows: Sequence[Row]
    adapter: Floats
    base: Floats
    reference: Floats
    tokens: Floats
    named: bool  # whether the reference is an adapter

    @property
    def spec(self) -> PreferenceSpec:
        return self.config.preference.resolved(self.config.train.objective)

    def pairs(self, known: Sequence[Row]) -> PreferenceScores:
        """Of rows with two answers; `known` are training rows, for the baseline."""
        spec, groups = self.spec, row_groups(self.rows)
        compares = self.config.train.objective not in WITHOUT_REFERENCE
        own, tokens = self._likelihood(self.adapter), np.stack([self.tokens[::2], self.tokens[1::2]], axis=1)
        changes = np.stack([(self.adapter - self.base)[side::2] / self.tokens[side::2] for side in (0, 1)], axis=1)
        mine, note = own, "prefers the answer with the higher mean log-probability"
        if compares:
            tokens_of = torch.from_numpy(self.tokens)
            now, fixed = (pair_scores(torch.from_numpy(sums), tokens_of) for sums in (self.adapter, self.reference))
            mine = log_ratio_gap(now, fixed, normalised=bool(spec.length_normalised)).numpy()
            changes = np.stack([(self.adapter - self.reference)[side::2] / self.tokens[side::2] for side in (0, 1)], axis=1)
            note = f"prefers the answer whose probability rose more against the {'reference' if self.named else 'base'}"
        theirs = self._likelihood(self.base)
        likelihood = "prefers the answer with the higher " + ("mean " if spec.length_normalised else "") + "log-probability"
        rivals = [PairPreferences(BASE_SYSTEM, theirs, groups, likelihood)]
        if self.named:
            rivals.append(PairPreferences(REFERENCE, self._likelihood(self.reference), groups, likelihood))
        answers = [_answers(row) for row in self.rows]
        rivals.append(longer_answer([one for one, _ in answers], [other for _, other in answers], groups))
        if self.config.evaluate.baselines:
            by_words = tfidf_difference([_answers(row) for row in known], answers, groups)
            rivals += [] if by_words is None else [by_words]
        adapter, likelier = PairPreferences(ADAPTER, mine, groups, note), (PairPreferences(ADAPTER, own, groups), rivals[0])
        beta = spec.beta if compares and self.config.train.objective != "ipo" else None
        return PreferenceScores(adapter, tuple(rivals), tokens, changes, likelier, beta)

    def rated(self, known: Sequence[Row]) -> PreferenceScores:
        """Of rows with a verdict on one answer: right if a wanted answer gained more than the median, or an unwanted one less."""
        groups, wanted = row_groups(self.rows), np.array([bool(row.desirable) for row in self.rows])
        ratio = self.adapter - self.reference
        sides = np.where(wanted, 1.0, -1.0)
        mine = sides * (ratio - np.median(ratio))
        likelihood = self.base / self.tokens
        verdicts = [bool(row.desirable) for row in known]
        majority = 1.0 if 2 * sum(verdicts) >= len(verdicts) else -1.0
        rivals = (
            PairPreferences(
                BASE_SYSTEM, sides * (likelihood - np.median(likelihood)), groups, "by mean log-probability, against the median"
            ),
            PairPreferences(MAJORITY, sides * majority, groups, "the same verdict on every answer"),
        )
        tokens = np.stack([self.tokens, self.tokens], axis=1)
        note = "takes an answer to be wanted if its probability rose by more than the median, against the reference"
        return PreferenceScores(PairPreferences(ADAPTER, mine, groups, note), rivals, tokens)

    def _likelihood(self, sums: Floats) -> Floats:
        by = self.tokens if self.spec.length_normalised else np.ones_like(self.tokens)
        return np.asarray((sums / by)[::2] - (sums / by)[1::2])


def _answers(row: Row) -> tuple[str, str]:
    other: Any = row.other
    return _text(row, supervised=True), _text(other, supervised=True)


def _text(row: Row, *, supervised: bool) -> str:
    return "\n".join(turn.text for turn in row.turns if turn.supervised == supervised)



"""Evaluates a preference run: which answer of each pair adapter, base, reference and simple baselines prefer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch
from lorakeet.data.pairs import encode_pair
from lorakeet.data.rows import Row, row_groups
from lorakeet.errors import DataError
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.compose import language_report
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.wording import number, span
from lorakeet.kinds.preference.loss import log_ratio_gap
from lorakeet.kinds.preference.measure import TIE, PairPreferences, length_of_answers, tfidf_difference
from lorakeet.kinds.preference.report import PreferenceScores, with_preferences
from lorakeet.kinds.preference.spec import KTO, needs_reference, preference_of, reference_of
from lorakeet.kinds.preference.task import Floats, pair_scores
from lorakeet.kinds.text.continued import read_earlier
from lorakeet.kinds.text.evaluate import TextEvaluator, text_of_turns
from lorakeet.kinds.text.reply import ADAPTER, Replier
from lorakeet.kinds.text.reply import BASE as BASE_SYSTEM
from lorakeet.models.generate.score import row_losses
from lorakeet.models.inject import activate, adapter_of, eject
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.compare import compare_outputs
from lorakeet.models.text.model import TextModel
from lorakeet.registry import BASE, START
from lorakeet.train.progress import counted

REFERENCE = "reference"  # its name on the model, and in reports
EARLIER = "earlier adapter"  # that the run began with, where the objective has no reference


def reference_path(config: RunConfig) -> Path | None:
    """The adapter that is the reference; None where it is the base, or the objective has none."""
    given = config.lora.earlier if reference_of(config.train) == START else reference_of(config.train)
    return None if given in (None, "", BASE) else Path(str(given))


def reference_adapter(config: RunConfig) -> Adapter | None:
    """That adapter; None where there is none. Raises DataError if it cannot be read."""
    path = reference_path(config)
    return None if path is None else read_earlier(config, path)


def begins_at_reference(config: RunConfig) -> bool:
    """Whether the model that training starts with computes what the reference does."""
    given = reference_of(config.train)
    return given == START or (given == BASE and config.lora.earlier is None)


@contextmanager
def as_reference(text: TextModel, adapter: Adapter | None, name: str | None) -> Iterator[None]:
    """A context in which `text` computes the reference: with the adapter off, or with `adapter` in place of the active `name`."""
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
            return self.short_enough()
        return [row for row in self.rows if encode_pair(row, self.encoder) is not None]

    @property
    def _rated(self) -> bool:
        return bool(self.config.train.objective == KTO)

    def report(self, title: str, *, baseline_rows: Sequence[Row]) -> Report:
        """Loss and replies of the wanted answers, as for other text, with the preferences of every system before them."""
        rows, spec = self.fitting(), self.config.evaluate
        if not rows:
            raise DataError("There are no rows to evaluate on. Name a file with rows, or raise data.max_tokens.")
        examples = self._examples(rows)
        adapter, tokens = self._log_probs(examples, ADAPTER)
        base, _ = self._log_probs(examples, BASE_SYSTEM)
        reference, named = base, reference_path(self.config) is not None
        if needs_reference(self.config.train.objective):
            with as_reference(self.text, self._reference_adapter(), self.name):
                reference, _ = self._scored(examples, REFERENCE)
        earlier, gone = self._earlier(examples)
        step = 1 if self._rated else 2
        wanted = [index for index, row in enumerate(rows) if row.desirable is not False]
        chosen = [rows[index] for index in wanted]
        if not chosen:
            raise DataError("No evaluated row has an answer that is wanted. Name a file with some.")
        losses = [
            RowLosses(name, -sums[::step][wanted], tokens[::step][wanted].astype(np.int64), row_groups(chosen))
            for name, sums in ((ADAPTER, adapter), (BASE_SYSTEM, base))
        ]
        replier = Replier(self.config, self.text, self.encoder, self.console, self.name, self.metric, self.residency)
        answered = replier.answered(chosen, [row for row in baseline_rows if row.desirable is not False])
        report = language_report(
            title, adapter=losses[0], base=losses[1], texts=[text_of_turns(row, supervised=False) for row in chosen],
            truths=[text_of_turns(row, supervised=True) for row in chosen], sources=[row.source for row in chosen], spec=spec,
            answered=answered,
        )  # fmt: skip
        report = self.with_judge(report, chosen, answered)
        if self._rated and len(wanted) == len(rows):
            missing = "The evaluated answers are all wanted, so no preference can be measured. Evaluate rows of both labels."
            return replace(report, warnings=(missing, *report.warnings))
        texts = [] if self._rated else [_answers(row) for row in rows]
        found = _Scored(self.config, adapter, base, reference, tokens, texts, row_groups(rows), named, earlier)
        scores = (found.paired(rows) if self._rated else found).preferences(_known_answers(baseline_rows, self._rated))
        left_out = len(self.rows) - len(rows)
        said = [f"{left_out} rows longer than {self.encoder.spec.max_tokens} tokens were left out of the evaluation."]
        report = with_preferences(report, scores, spec)
        return replace(report, warnings=(*said[: bool(left_out)], *gone, *report.warnings))

    def _earlier(self, examples: Sequence[Example]) -> tuple[Floats | None, list[str]]:
        """log p of each answer by the adapter that the run began with, where that is no reference; and why it is not known."""
        given = self.config.lora.earlier
        if given is None or needs_reference(self.config.train.objective):
            return None, []
        if not Path(given).exists():
            return None, [f"The earlier adapter {given} is not there any more, so the adapter is not compared with it."]
        with as_reference(self.text, read_earlier(self.config, given), self.name):
            return self._scored(examples, EARLIER)[0], []

    def drift_from_reference(self, batches: Sequence[Batch]) -> str:
        """Mean KL(reference ‖ adapter) a token with its interval, where the reference is an adapter."""
        held = self.reference or reference_adapter(self.config)
        if held is None or reference_path(self.config) is None:
            return ""
        add_adapter(self.text, held, REFERENCE)
        try:
            kl = compare_outputs((self.text, REFERENCE), (self.text, self.name), batches, spec=self.config.evaluate).mean_kl
        finally:
            eject(self.text.model, REFERENCE)
            activate(self.text.model, self.name)
        return f". From the reference, on the same texts: {number(kl.value, 4)} ({span(kl, 4)})"

    def _reference_adapter(self) -> Adapter | None:
        """The reference; for the base pairs that add nothing, which take the adapter's path through the kernels."""
        held = self.reference or reference_adapter(self.config)
        if held is not None or reference_of(self.config.train) == BASE:
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


@dataclass(frozen=True, eq=False)
class _Scored:
    """The log-probabilities of pairs of answers (2n,), chosen and rejected one after another, by each model, and their tokens.

    `texts` are the answers of each pair, `groups` ids of pairs that depend on each other.
    """

    config: RunConfig
    adapter: Floats
    base: Floats
    reference: Floats
    tokens: Floats
    texts: Sequence[tuple[str, str]]
    groups: tuple[Hashable, ...] | None
    named: bool  # whether the reference is an adapter
    earlier: Floats | None = None  # of the adapter that the run began with, where that is no reference

    def paired(self, rows: Sequence[Row]) -> _Scored:
        """The same of rated answers, one a row, put into pairs of a wanted and an unwanted one.

        Every row of the larger class has a partner of the smaller one; pairs with one partner are a group.
        """
        order = np.random.default_rng([self.config.evaluate.seed, 6]).permutation(len(rows))
        wanted, unwanted = ([int(at) for at in order if bool(rows[at].desirable) is side] for side in (True, False))
        if not wanted or not unwanted:
            raise DataError("The evaluated rows have answers of one label only; expected wanted and unwanted ones.")
        count = max(len(wanted), len(unwanted))
        pairs = [(wanted[at % len(wanted)], unwanted[at % len(unwanted)]) for at in range(count)]
        at = np.array(pairs).ravel()
        smaller = 0 if len(wanted) <= len(unwanted) else 1
        answers = [text_of_turns(row, supervised=True) for row in rows]
        groups = row_groups(rows) or tuple(row.source for row in rows)
        return replace(
            self, adapter=self.adapter[at], base=self.base[at], reference=self.reference[at], tokens=self.tokens[at],
            texts=[(answers[one], answers[other]) for one, other in pairs],
            groups=tuple(groups[pair[smaller]] for pair in pairs),
        )  # fmt: skip

    def preferences(self, known: Sequence[tuple[str, str]]) -> PreferenceScores:
        """What each system prefers; `known` are the answers of training pairs, for the baseline."""
        spec, objective = preference_of(self.config), self.config.train.objective
        compares, groups, named = needs_reference(objective), self.groups, REFERENCE if self.named else BASE_SYSTEM
        likely = {ADAPTER: self._likelihood(self.adapter), BASE_SYSTEM: self._likelihood(self.base)}
        if self.named:
            likely[REFERENCE] = self._likelihood(self.reference)
        start, start_name = (self.reference, "the reference") if compares else (self.base, "the base")
        changes = np.stack([((self.adapter - start) / self.tokens)[side::2] for side in (0, 1)], axis=1)
        mine, note = likely[ADAPTER], "prefers the answer with the higher mean log-probability"
        rivals = [PairPreferences(BASE_SYSTEM, likely[BASE_SYSTEM], groups, note)]
        if self.earlier is not None:
            rivals.append(PairPreferences(EARLIER, self._likelihood(self.earlier), groups, "which the run began with"))
        if compares:
            counts = torch.from_numpy(self.tokens)
            now, fixed = (pair_scores(torch.from_numpy(sums), counts) for sums in (self.adapter, self.reference))
            mine = log_ratio_gap(now, fixed, normalised=bool(spec.length_normalised)).numpy()
            note = f"prefers the answer whose probability rose more against the {named}"
            rivals = [PairPreferences(named, np.zeros_like(mine), groups, "prefers neither answer, measured as the adapter is")]
        rivals.append(length_of_answers(known, self.texts, groups))
        if self.config.evaluate.baselines:
            by_words = tfidf_difference(known, self.texts, groups)
            rivals += [] if by_words is None else [by_words]
        beta = spec.beta if compares and objective != "ipo" else None
        tokens = np.stack([self.tokens[::2], self.tokens[1::2]], axis=1)
        adapter = PairPreferences(ADAPTER, mine, groups, note, TIE if compares else 0.0)
        likelier = tuple(PairPreferences(name, scores, groups) for name, scores in likely.items())
        return PreferenceScores(adapter, tuple(rivals), tokens, changes, likelier, beta, compares, start_name)

    def _likelihood(self, sums: Floats) -> Floats:
        means = sums / self.tokens
        return np.asarray(means[::2] - means[1::2])


def _known_answers(rows: Sequence[Row], rated: bool) -> list[tuple[str, str]]:
    """The answers of training pairs; of rated rows a wanted and an unwanted one each, in their order."""
    if not rated:
        return [_answers(row) for row in rows]
    sides = ([text_of_turns(row, supervised=True) for row in rows if bool(row.desirable) is side] for side in (True, False))
    return list(zip(*sides, strict=False))


def _answers(row: Row) -> tuple[str, str]:
    other: Any = row.other
    return text_of_turns(row, supervised=True), text_of_turns(other, supervised=True)

"""Evaluates a text model with and without its adapter on the same rows, and makes the measured sections of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Candidates, Encoder, encode_rows
from lorakeet.data.few_shot import FewShot, choose_examples
from lorakeet.data.leaks import counted_once
from lorakeet.data.pack import Batch, micro_batches
from lorakeet.data.prepare import label_counts, template_remedy, unnamed_labels_note
from lorakeet.data.proposals.labels import doubtful_labels
from lorakeet.data.rows import Row, row_groups
from lorakeet.errors import ConfigError, DataError
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.baselines import majority_class, tfidf_logistic
from lorakeet.evaluate.compare import Scores
from lorakeet.evaluate.intervals import Floats
from lorakeet.evaluate.judge import ReplyPair
from lorakeet.evaluate.likelihood import RowLosses, label_log_probs
from lorakeet.evaluate.own_metric import OwnMetric
from lorakeet.evaluate.report.compose import Answered, classification_report, language_report
from lorakeet.evaluate.report.report import Drift, Report
from lorakeet.evaluate.temperature import calibrated
from lorakeet.kinds.text.kept_answers import KeptAnswers
from lorakeet.kinds.text.reply import ADAPTER, BASE, FEW_SHOT, FewShotLimits, Replier, few_shot_limits
from lorakeet.memory.allocator import release_free_memory
from lorakeet.models.generate.sample import sampled_texts
from lorakeet.models.generate.score import label_endings, label_scores, row_losses
from lorakeet.models.inject import activate
from lorakeet.models.text.compare import compare_outputs
from lorakeet.models.text.encoder import require_encoder, text_embedder
from lorakeet.models.text.model import TextModel
from lorakeet.planning.evaluation_batches import tokens_within_peak
from lorakeet.runs.judge_server import compared_by_judge
from lorakeet.runs.residency import Residency
from lorakeet.train.progress import counted

NO_FEW_SHOT = (
    "There is no few-shot base: no training row can be shown to it, since they have tools, or do not fit beside a row into "
    "data.max_tokens."
)
LIKELIEST_LABEL = "chooses the likeliest of the labels after the prompt, as all systems do, and writes no text"
CALIBRATION_ROWS, CALIBRATION_LEAST = 64, 16  # training rows that the few-shot base is calibrated on


def require_encodable(config: RunConfig) -> None:
    """Raises ConfigError if evaluate.encoder is no encoder, or there is a memory budget, which does not count it."""
    if config.evaluate.encoder is None:
        return
    if config.memory.limit:
        raise ConfigError(
            f"evaluate.encoder is {config.evaluate.encoder}, and memory.budget {config.memory.limit} does not count its memory. "
            "Leave one of them out."
        )
    require_encoder(config.evaluate.encoder)


@dataclass(frozen=True)
class TextEvaluator:
    """Measures `text` on `rows` with the adapter `name` on and off."""

    config: RunConfig
    text: TextModel
    encoder: Encoder
    rows: Sequence[Row]
    console: Console
    name: str = "default"
    metric: OwnMetric | None = None  # of replies, the user's own
    residency: Residency[Any] | None = None  # by which more tokens than usual pass together; None: never
    kept: KeptAnswers | None = None  # of the base, by earlier evaluations; None: all are computed

    def report(self, title: str, *, baseline_rows: Sequence[Row]) -> Report:
        """The measured sections: classification if the rows have labels, else replies to prompts, loss and perplexity.

        `baseline_rows` are the training rows that simple baselines are fitted to, and that the few-shot base is shown.
        """
        short = self.short_enough()
        rows = counted_once(short)
        if not rows:
            raise DataError("There are no rows to evaluate on. Name a file with rows, or raise data.max_tokens.")
        about: dict[str, Any] = {"sources": [row.source for row in rows], "spec": self.config.evaluate}
        said = f"Evaluation: base, adapter and what it is compared with, on {len(rows):,} rows."
        self.console.print(said, highlight=False, soft_wrap=True)
        if self.encoder.labels:
            answers = self.answers(rows, BASE), self.answers(rows, ADAPTER)
            texts, floors = [row.text for row in rows], list[Answers]()
            if self.config.evaluate.baselines and baseline_rows:
                labels, groups, known = self.encoder.labels, row_groups(rows), [row.text for row in baseline_rows]
                train_labels, truth = [_label(row) for row in baseline_rows], [_label(row) for row in rows]
                majority = majority_class(train_labels, truth, labels=labels, groups=groups)
                folder = self.config.evaluate.encoder
                embed = None if folder is None else text_embedder(require_encoder(folder))
                tfidf = tfidf_logistic(
                    known, train_labels, texts=texts, truth=truth, labels=labels, groups=groups, embed=embed
                )
                note = f"fitted to {len(baseline_rows)} rows" + (f"; {tfidf.note}" if tfidf.note else "")
                floors = [majority, replace(tfidf, note=note)]
            report = classification_report(
                title, base=answers[0], adapter=answers[1], few_shot=self._few_shot(rows, baseline_rows), floors=floors,
                texts=texts, **about,
            )  # fmt: skip
        else:
            losses = self.losses(rows, BASE), self.losses(rows, ADAPTER)
            answered = self.replier().answered(rows, baseline_rows)
            texts, truths = ([text_of_turns(row, supervised=supervised) for row in rows] for supervised in (False, True))
            if answered is not None:  # whose references are the truth
                texts = [_before_last(row) for row in rows]
            report = language_report(
                title, base=losses[0], adapter=losses[1], texts=texts, truths=truths, answered=answered, **about
            )
            report = self.with_judge(report, rows, answered)
        warnings = []
        if left_out := len(self.rows) - len(short):
            warnings.append(f"{left_out} rows longer than {self.encoder.spec.max_tokens} tokens were left out of the evaluation.")
        if copies := len(short) - len(rows):
            said = "evaluated row is an exact copy of another" if copies == 1 else "evaluated rows are exact copies of others"
            warnings.append(f"{copies} {said}, to the character: each is measured once, so that it is one observation.")
        few_shot = any(system.name == FEW_SHOT for system in report.systems)
        labels, template = self.encoder.labels, self.encoder.spec.template
        doubtful = doubtful_labels(label_counts((*baseline_rows, *rows), labels)) if baseline_rows else set()
        unnamed = unnamed_labels_note(rows, labels, template, few_shot=few_shot, doubtful=doubtful)
        added = [unnamed] if unnamed else []
        if baseline_rows and not few_shot and self._wants_few_shot(rows):
            added.append(NO_FEW_SHOT)
        if self.kept is not None:
            added += self.kept.said
        remedy = template_remedy(rows, labels, template, doubtful)
        remedies = () if remedy is None or not unnamed else (remedy,)
        return replace(report, warnings=(*warnings, *report.warnings, *added), remedies=remedies)

    def with_judge(self, report: Report, rows: Sequence[Row], answered: Answered | None) -> Report:
        """The report with what evaluate.judge says of the replies to `rows`, if it is given and there are some."""
        if answered is None:
            return report
        adapter, base = answered.adapter, answered.base
        pairs = [
            ReplyPair(_before_last(rows[row]), *texts)
            for row, *texts in zip(answered.rows, adapter.references, adapter.texts, base.texts, strict=True)
        ]
        return compared_by_judge(report, pairs, (ADAPTER, BASE), self.config.evaluate, self.console, adapter.groups)

    def _wants_few_shot(self, rows: Sequence[Row]) -> bool:
        """True if a few-shot base should answer these rows, by the settings."""
        spec = self.config.evaluate
        return spec.examples > 0 and (bool(self.encoder.labels) or (spec.answers > 0 and any(row.answered for row in rows)))

    def drift(self) -> Drift | None:
        """Mean KL(base ‖ adapter) per token on texts that the base samples, seeded; None if there are none."""
        spec = self.config.evaluate
        if spec.drift_texts == 0:
            return None
        self.console.print(f"Drift: the base samples {spec.drift_texts} texts, which base and adapter then read.", soft_wrap=True)
        examples = sampled_texts(self.text, spec.drift_texts, spec.drift_tokens, seed=spec.seed)
        if not examples:
            return None
        batches = micro_batches(examples, self.config.train.micro_tokens, padded=self.text.pads)
        parity = compare_outputs((self.text, None), (self.text, self.name), batches, spec=spec)
        detail = f"{parity.tokens:,} tokens sampled at temperature 1, seed {spec.seed}{self.drift_from_reference(batches)}"
        return Drift(parity.mean_kl, len(examples), detail)

    def drift_from_reference(self, batches: Sequence[Batch]) -> str:
        """What the report adds about the drift from another adapter on these texts; nothing here."""
        return ""

    def fitting(self) -> list[Row]:
        """The rows of at most data.max_tokens tokens, without exact copies of others."""
        return counted_once(self.short_enough())

    def short_enough(self) -> list[Row]:
        """The rows of at most data.max_tokens tokens."""
        return [row for row in self.rows if self.encoder.encode(row) is not None]

    def replier(self) -> Replier:
        """What writes replies with the same model."""
        own = self.metric, self.residency, self.kept
        return Replier(self.config, self.text, self.encoder, self.console, self.name, *own)

    def scores(self, rows: Sequence[Row], system: str) -> Scores:
        """The answers of `system` to labelled rows; its losses on others."""
        return self.answers(rows, system) if self.encoder.labels else self.losses(rows, system)

    def answers(self, rows: Sequence[Row], system: str) -> Answers:
        """The label probabilities of `system` on labelled rows."""
        return self._answers(rows, system, self.encoder, self.config.train.micro_tokens)

    def _answers(self, rows: Sequence[Row], system: str, encoder: Encoder, micro_tokens: int, among: str = "") -> Answers:
        candidates: list[Candidates] = [found for row in rows if (found := encoder.candidates(row)) is not None]
        activate(self.text.model, None if system in (BASE, FEW_SHOT) else self.name)
        with counted(self.console, f"{system} answers rows{among}", len(candidates)) as advance:

            def score(some: Sequence[int]) -> Floats:
                return label_scores(self.text, [candidates[index] for index in some], micro_tokens=micro_tokens, progress=advance)

            if self.kept is None or system == ADAPTER:
                scores = score(range(len(candidates)))
            else:
                scores = self.kept.numbers(system, [(row.prompt, *row.completions) for row in candidates], score)
        truth = np.array([row.label for row in candidates], dtype=np.int64)
        note = LIKELIEST_LABEL if system == BASE else ""
        return Answers(system, self.encoder.labels, truth, label_log_probs(scores), row_groups(rows), note)

    def _few_shot(self, rows: Sequence[Row], known: Sequence[Row]) -> Answers | None:
        """The base's answers behind examples of training rows, calibrated on other training rows; None without examples."""
        spec, limits = self.config.evaluate, self._few_shot_limits(rows)
        examples = choose_examples(known, spec.examples, limits.encoder, seed=spec.seed, own=self.encoder.spec.max_tokens)
        if not examples:
            return None
        few, chosen = FewShot(limits.encoder, examples), {row.source for row in examples}

        def behind(some: Sequence[Row]) -> list[Row]:
            return [few.row(shorter) for row in some if (shorter := self.encoder.shortened(row)) is not None]

        order = np.random.default_rng([self.config.evaluate.seed, 5]).permutation(len(known))
        others = [row for index in order if (row := known[index]).source not in chosen and self.encoder.encode(row) is not None]
        answered, calibrating = behind(rows), behind(others[:CALIBRATION_ROWS]) if len(others) >= CALIBRATION_LEAST else []
        among = f", {len(calibrating)} of them training rows that calibrate it" if calibrating else ""
        both = self._answers([*answered, *calibrating], FEW_SHOT, limits.encoder, limits.tokens, among)
        release_free_memory()  # of wide batches
        found = both.rows(slice(len(answered)), row_groups(answered))
        note = f"sees up to {len(examples)} training rows with their labels before each row"
        if calibrating:
            found = calibrated(found, both.rows(slice(len(answered), None), None))
            note += f"; temperature and label bias fitted to {len(calibrating)} others"
        return replace(found, note=note)

    def _few_shot_limits(self, rows: Sequence[Row]) -> FewShotLimits:
        """Wide rows if all labels have one token: those of several repeat each row for each label behind the same examples."""
        first = self.encoder.candidates(rows[0])
        if first is not None and all(len(ending) == 1 for ending in label_endings(self.text, first)):
            found = few_shot_limits(self.config, self.text, self.encoder)
        else:
            found = FewShotLimits(self.encoder, max(self.config.train.micro_tokens, self.encoder.spec.max_tokens))
        if self.residency is None:
            return found
        return replace(found, tokens=tokens_within_peak(self.residency, found.tokens, self.text.device))

    def losses(self, rows: Sequence[Row], system: str) -> RowLosses:
        """The loss of `system` on the target tokens of each row."""
        activate(self.text.model, None if system == BASE else self.name)
        examples, tokens = encode_rows(rows, self.encoder).examples, self.config.train.micro_tokens
        with counted(self.console, f"{system} reads rows", len(examples)) as advance:

            def score(some: Sequence[int]) -> Floats:
                chosen = [examples[index] for index in some]
                return np.stack(row_losses(self.text, chosen, micro_tokens=tokens, progress=advance), axis=1)

            if self.kept is None or system == ADAPTER:
                found = score(range(len(examples)))
            else:
                counts = [int(row.supervised.sum()) for row in examples]
                read = [(row.ids, row.supervised.astype(np.int64)) for row in examples]
                found = self.kept.numbers(system, read, score, tokens=counts)
        return RowLosses(system, found[:, 0], found[:, 1].astype(np.int64), row_groups(rows))


def _label(row: Row) -> str:
    if row.label is None:
        raise DataError(f"{row.source} has no label, but other rows have one. Give every row a label, or none.")
    return row.label


def text_of_turns(row: Row, *, supervised: bool) -> str:
    """The text of the turns that are targets, or of the others."""
    return "\n".join(turn.text for turn in row.turns if turn.supervised == supervised)


def _before_last(row: Row) -> str:
    """What was said before the last turn, with tool calls."""
    return "\n".join(filter(None, (part for turn in row.turns[:-1] for part in (turn.text.strip(), turn.extra))))

"""Answers rows that have none: labels with their probability, or replies to prompts; and which ones are marked for review."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Candidates, Encoder, Ids
from lorakeet.data.rows import Row
from lorakeet.errors import DataError, EnvironmentProblem, percent
from lorakeet.evaluate.answers import none_right
from lorakeet.evaluate.calibration import ReliabilityBin
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.likelihood import label_log_probs
from lorakeet.evaluate.report.report import read_report
from lorakeet.kinds.text.reply import ADAPTER, FIRST_LINE, LINE, Prompts, Replier
from lorakeet.models.generate.score import label_scores
from lorakeet.models.inject import activate
from lorakeet.models.text.model import TextModel
from lorakeet.runs.open_adapter import NAME, Opened

_DIGITS = 6  # of a probability
SHARES_RIGHT = ("accuracy", "exact_match", "normalised_match", "json_match", "numeric_match")  # as a headline has them
REPLIED = "reply_words"  # a metric of every system that replied


@dataclass(frozen=True)
class Answer:
    """An answer to a row, empty for none; labels have a probability and its distance to the next one."""

    text: str = ""
    probability: float | None = None
    margin: float | None = None
    shortened: bool = False
    review: bool = True

    def cells(self, columns: Sequence[str]) -> dict[str, object]:
        numbers = [None if value is None else round(value, _DIGITS) for value in (self.probability, self.margin)]
        every = [self.text, *numbers, "yes" if self.review else ""]
        return dict(zip(columns, every if len(columns) == len(every) else [every[0], every[-1]], strict=True))


@dataclass(frozen=True)
class RightShare:
    """How often the run's report found answers right: all of them, and labels by their probability."""

    right: Estimate | None = None
    bins: tuple[ReliabilityBin, ...] = ()
    lost: str = ""  # labels of which it found no row right

    @classmethod
    def of(cls, opened: Opened) -> RightShare:
        """What the report of the run says of its adapter; nothing without a report, or where it counts no right answers."""
        if opened.run is None or not opened.run.report.is_file():
            return cls()
        report = read_report(opened.run.report)
        metric = next((one.metric for one in report.comparisons if one.metric in SHARES_RIGHT), "")
        found = [one.metrics[metric] for one in report.systems if one.role == "adapter" and metric in one.metrics]
        bins = [one.bins for one in report.reliabilities if one.role == "adapter"]
        lost = [none_right(one) for one in report.confusions[-1:]]  # the adapter's is the last
        return cls(found[0] if found else None, bins[0] if bins else (), *lost)

    def doubts(self, least: float, probability: float | None = None) -> bool:
        """Whether answers of about this probability were right less often than `least`, by the upper end of the interval."""
        near = None
        if probability is not None:
            near = min(self.bins, key=lambda one: abs(one.confidence - probability), default=None)
        found = self.right if near is None else near.accuracy
        return found is not None and found.high < least

    @property
    def said(self) -> str:
        if self.right is None:
            return ""
        lost = f", and {self.lost}" if self.lost else ""
        return f" (the report found {percent(self.right.value)} of {self.right.n:,} rows right{lost})"


def ends_with_line(opened: Opened) -> tuple[bool, str]:
    """Whether replies without a template end with their first line: as in the report, else if all training answers have one.

    A sentence, if neither is known.
    """
    why = "no training rows are named"
    try:
        if opened.run is not None and opened.run.report.is_file():
            systems = read_report(opened.run.report).systems
            replied = [one.note for one in systems if one.role == "adapter" and REPLIED in one.metrics]
            if replied:
                return FIRST_LINE in replied[0], ""
        if opened.config.data.train:
            answers = [row.turns[-1].text.strip() for row in opened.dataset.train if row.answered]
            return bool(answers) and not any(LINE in answer for answer in answers), ""
    except (DataError, EnvironmentProblem) as error:
        why = str(error).rstrip(".")
    return False, f"Answers are not cut after their first line: whether training answers have one is not known ({why})."


@dataclass(frozen=True)
class Answerer:
    """The model with its adapter, and how it answers."""

    config: RunConfig
    text: TextModel
    encoder: Encoder
    console: Console
    ending: str  # of replies; empty for none
    measured: RightShare
    review: float  # answers less likely, or right less often, are marked
    max_tokens: int  # of a reply

    def answers(self, rows: Sequence[Row | None]) -> list[Answer]:
        """The answer to each row, in order; an empty one where there is no row, or it is left out as too long."""
        places = [place for place, row in enumerate(rows) if row is not None]
        given = [row for row in rows if row is not None]
        found = self._labelled(given) if self.encoder.labels else self._replied(given)
        every = [Answer()] * len(rows)
        for place, answer in zip(places, found, strict=True):
            every[place] = answer
        return every

    def _labelled(self, rows: Sequence[Row]) -> Iterator[Answer]:
        """The likeliest label of each row: log p of every label by the scoring of `evaluate`."""
        encoded = [self.encoder.candidates(row) for row in rows]
        kept: list[Candidates] = [one for one in encoded if one is not None]
        activate(self.text.model, NAME)
        scores = label_scores(self.text, kept, micro_tokens=self.config.train.micro_tokens)
        probabilities = np.exp(label_log_probs(scores)) if kept else scores
        following = iter(probabilities)
        for one in encoded:
            if one is None:
                yield Answer()
                continue
            row = next(following)
            best, second = (float(value) for value in np.sort(row)[::-1][:2])
            doubtful = best < self.review or one.truncated or self.measured.doubts(self.review, best)
            yield Answer(self.encoder.labels[int(row.argmax())], best, best - second, one.truncated, doubtful)

    def _replied(self, rows: Sequence[Row]) -> Iterator[Answer]:
        """The greedy reply to each prompt, by the writing of `evaluate`."""
        limit, context = self.max_tokens, self.text.context
        encoded = [self.encoder.question(row) for row in rows]
        questions: dict[int, Ids] = {
            place: pair[0]
            for place, pair in enumerate(encoded)
            if pair is not None and len(pair[0]) and (context is None or len(pair[0]) + limit <= context)
        }
        replies: dict[int, tuple[str, bool]] = {}
        if questions:
            prompted = tuple(rows[place] for place in questions)
            blank = ("",) * len(questions)
            prompts = Prompts(prompted, tuple(questions), tuple(questions.values()), blank, limit, self.ending)
            found = Replier(self.config, self.text, self.encoder, Console(quiet=True), NAME).write(ADAPTER, prompts)
            replies.update(zip(questions, zip(found.texts, found.cut, strict=True), strict=True))
        doubted = self.measured.doubts(self.review)
        for place, row in enumerate(rows):
            if place not in questions:
                yield Answer()
                continue
            reply, cut = replies[place]
            shortened = self.encoder.shortened(row) is not row
            yield Answer(reply, shortened=shortened, review=bool(doubted or cut or shortened or not reply))

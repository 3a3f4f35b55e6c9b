"""Has base, few-shot base and adapter answer the same held-out prompts, beside copies of training answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Encoder, Ids
from lorakeet.data.few_shot import BETWEEN, FewShot, choose_examples, wider
from lorakeet.data.rows import Row, row_groups
from lorakeet.data.template import decoded, is_templated
from lorakeet.evaluate.baselines import constant_answer, median_answer, nearest_answers
from lorakeet.evaluate.own_metric import OwnMetric
from lorakeet.evaluate.replies import Replies
from lorakeet.evaluate.report.compose import Answered
from lorakeet.evaluate.spec import LEAST_ANSWERS
from lorakeet.kinds.text.kept_answers import KeptAnswers
from lorakeet.models.generate.sample import sample
from lorakeet.models.inject import activate
from lorakeet.models.text.model import TextModel
from lorakeet.planning.evaluation_batches import tokens_within_peak
from lorakeet.planning.forecast_text_run import REPLY_TOKENS
from lorakeet.runs.residency import Residency
from lorakeet.train.progress import counted

BASE, ADAPTER, FEW_SHOT = "base", "adapter", "few-shot base"
LONGER = 1.5  # times the longest reference that a reply may have in tokens
LEAST_TOKENS = 16
LINE = "\n"
FIRST_LINE = "its replies end with their first line, as all training answers do"  # a note in the report
TOGETHER = 16  # prompts beyond the first ones, after each of which the time is looked at


@dataclass(frozen=True)
class Prompts:
    """The rows whose last answers are written anew, their indices, their prompts as tokens, and the answers that they have.

    A reply has at most `limit` tokens, and is cut at `ending`, if there is one. They were chosen among `available` prompts.
    `known` are the answers of training rows.
    """

    rows: tuple[Row, ...]
    indices: tuple[int, ...]
    questions: tuple[Ids, ...]
    references: tuple[str, ...]
    limit: int
    ending: str = ""
    available: int = 0
    known: tuple[str, ...] = ()

    def first(self, count: int) -> Prompts:
        """The first `count` of them."""
        return replace(
            self, rows=self.rows[:count], indices=self.indices[:count], questions=self.questions[:count],
            references=self.references[:count],
        )  # fmt: skip


@dataclass(frozen=True)
class FewShotLimits:
    """How few-shot rows are encoded, and how many `tokens` are computed together."""

    encoder: Encoder
    tokens: int


def few_shot_limits(config: RunConfig, text: TextModel, encoder: Encoder) -> FewShotLimits:
    """Rows of up to data/few_shot.widest tokens, under memory.budget of data.max_tokens; together train.micro_tokens, or one row.

    That is what planning/forecast_text_run.evaluation_of plans.
    """
    chosen = encoder if config.memory.limit else wider(encoder, text.context)
    return FewShotLimits(chosen, max(config.train.micro_tokens, chosen.spec.max_tokens))


@dataclass(frozen=True)
class Replier:
    """Writes replies of `text` with the adapter `name` on and off; `own` is a metric of the user's."""

    config: RunConfig
    text: TextModel
    encoder: Encoder
    console: Console
    name: str
    own: OwnMetric | None = None
    residency: Residency[Any] | None = None  # by which more tokens than usual pass together; None: never
    kept: KeptAnswers | None = None  # of the base, by earlier evaluations; None: all are written
    clock: Callable[[], float] = time.monotonic

    def prompts(self, rows: Sequence[Row], known: Sequence[Row]) -> Prompts | None:
        """A seeded choice of evaluate.answers rows that end in an answer; None if there are none.

        Replies end with their first line if no chat template ends them and all answers of `known` and `rows` have one line.
        """
        spec = self.config.evaluate
        order = np.random.default_rng([spec.seed, 4]).permutation(len(rows)).tolist() if spec.answers else []
        found = {index: pair for index in order if (pair := self.encoder.question(rows[index])) is not None and len(pair[0])}
        longest = max((len(reference) for _, reference in found.values()), default=0)
        limit = min(spec.answer_tokens, max(LEAST_TOKENS, math.ceil(LONGER * longest)))
        context = self.text.context or math.inf
        fitting = [index for index, (prompt, _) in found.items() if len(prompt) + limit <= context]
        chosen = fitting[: spec.answers]
        if not chosen:
            return None
        prompted = tuple(rows[index] for index in chosen)
        answers = [row.turns[-1].text.strip() for row in (*(row for row in known if row.answered), *prompted)]
        one_line = not self._templated(prompted[0]) and not any(LINE in answer for answer in answers)
        references = tuple(self._reference(rows[index], found[index][1]) for index in chosen)
        questions = tuple(found[index][0] for index in chosen)
        taught = tuple(self._reference(row) for row in known if row.answered)
        return Prompts(prompted, tuple(chosen), questions, references, limit, LINE if one_line else "", len(fitting), taught)

    def answered(self, rows: Sequence[Row], known: Sequence[Row]) -> Answered | None:
        """The replies of all systems to the prompts of `rows`; None if no row ends in an answer.

        `known` are training rows: the source of few-shot examples and of copied answers.
        """
        spec, prompts = self.config.evaluate, self.prompts(rows, known)
        if prompts is None:
            return None
        adapter = self.write(ADAPTER, prompts, seconds=spec.answer_seconds)
        if len(adapter.texts) < prompts.available:
            some = f"answers {len(adapter.texts)} of {prompts.available} prompts (evaluate.answers)"
            adapter = replace(adapter, note="; ".join(filter(None, (some, adapter.note))))
        wanted, prompts = len(prompts.rows), prompts.first(len(adapter.texts))
        base = self.write(BASE, prompts)
        copies: tuple[Replies, ...] = ()
        taught = [row for row in known if row.answered]
        if spec.baselines and taught:
            answers, median = prompts.known, median_answer(prompts.known, like=base)
            known_prompts, new_prompts = ([prompt_of(row) for row in some] for some in (taught, prompts.rows))
            copies = nearest_answers(known_prompts, answers, new_prompts, like=base), constant_answer(answers, like=base)
            copies += () if median is None else (median,)
        return Answered(prompts.indices, adapter, base, self._few_shot(prompts, taught), copies, self.own, wanted)

    def _few_shot(self, prompts: Prompts, taught: Sequence[Row]) -> Replies | None:
        """The base's replies behind examples of `taught` rows; None if no example fits."""
        spec, context = self.config.evaluate, self.text.context
        limits = few_shot_limits(self.config, self.text, self.encoder)
        examples = choose_examples(taught, spec.examples, limits.encoder, seed=spec.seed, own=self.encoder.spec.max_tokens)
        if not examples:
            return None
        few = FewShot(limits.encoder, examples, limit=None if context is None else context - prompts.limit)
        shorter = [short for row in prompts.rows if (short := self.encoder.shortened(row)) is not None]
        questions = [found[0] for row in shorter if (found := limits.encoder.question(few.row(row))) is not None]
        blank = not self._templated(prompts.rows[0]) and not any(BETWEEN in row.turns[-1].text.strip() for row in taught)
        ending = prompts.ending or (BETWEEN if blank else "")  # as it ended each example
        note = f"sees up to {len(examples)} training rows with their answers before each prompt"
        return self.write(FEW_SHOT, replace(prompts, questions=tuple(questions), ending=ending), note=note, tokens=limits.tokens)

    def write(
        self, system: str, prompts: Prompts, *, seconds: float = math.inf, note: str = "", tokens: int | None = None
    ) -> Replies:
        """The greedy replies of a system; those beyond the first LEAST_ANSWERS until `seconds` are over.

        `tokens` pass through the model together, train.micro_tokens by default, but no fewer than REPLY_TOKENS, and more where
        the plan's peak allows it.
        """
        most = max(tokens or self.config.train.micro_tokens, REPLY_TOKENS)
        if self.residency is not None:
            most = tokens_within_peak(self.residency, most, self.text.device)
        activate(self.text.model, self.name if system == ADAPTER else None)
        with counted(self.console, f"{system} writes replies", len(prompts.questions)) as advance:
            written = self._written(system, prompts, most, self.clock() + seconds, advance)
        whole = [self._decoded(ids) for ids in written]
        texts = [text.split(prompts.ending, 1)[0].rstrip() for text in whole] if prompts.ending else whole
        cut = [len(ids) >= prompts.limit and text == full for ids, text, full in zip(written, texts, whole, strict=True)]
        if prompts.ending == LINE:
            note = "; ".join(filter(None, (note, FIRST_LINE)))
        done = prompts.first(len(texts))
        about = prompts.known, self.config.evaluate.scale
        return Replies(system, tuple(texts), done.references, tuple(cut), row_groups(done.rows), note, *about)

    def _written(
        self, system: str, prompts: Prompts, most: int, until: float, advance: Callable[[int], None]
    ) -> list[Ids]:
        """The replies of a system as tokens; those of the base may be of an earlier evaluation."""
        questions = prompts.questions
        if self.kept is not None and system != ADAPTER:

            def write(some: Sequence[int]) -> list[Ids]:
                return self._some([questions[index] for index in some], prompts, most, advance)

            return self.kept.replies(system, questions, f"{prompts.limit} {prompts.ending!r}", write)
        written: list[Ids] = []
        for start, stop in pairwise([0, *range(LEAST_ANSWERS, len(questions), TOGETHER), len(questions)]):
            if start and self.clock() > until:
                break
            written += self._some(questions[start:stop], prompts, most, advance)
        return written

    def _templated(self, row: Row) -> bool:
        return is_templated(row, self.encoder.tokenizer, self.encoder.spec)

    def _decoded(self, ids: Ids) -> str:
        return decoded(self.text.tokenizer, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def _reference(self, row: Row, answer: Ids | None = None) -> str:
        """The row's own last answer; a tool call as the template writes it, which is `answer` as tokens."""
        if not row.turns[-1].extra:
            return row.turns[-1].text.strip()
        if answer is None:
            found = self.encoder.question(row)
            answer = None if found is None else found[1]
        return "" if answer is None else self._decoded(answer)

    def _some(self, questions: Sequence[Ids], prompts: Prompts, most: int, advance: Callable[[int], None]) -> list[Ids]:
        """The replies to a few questions, at most `most` tokens at once."""
        order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
        limit, done = prompts.limit, partial(self._has, prompts.ending) if prompts.ending else None
        found: dict[int, Ids] = {}
        for part in _parts(order, [len(question) + limit for question in questions], most):
            chosen = [questions[index] for index in part]
            replies = sample(self.text, chosen, max_tokens=limit, temperature=0.0, done=done)
            found |= dict(zip(part, replies, strict=True))
            advance(len(part))
        return [found[index] for index in range(len(questions))]

    def _has(self, ending: str, ids: list[int]) -> bool:
        """Whether a reply goes on beyond its ending, at which it is cut."""
        return ending in self._decoded(np.array(ids, np.int64))


def without_effect(config: RunConfig, rows: Sequence[Row], labels: Sequence[str]) -> str:
    """A sentence if settings that are about replies change nothing, since none are written to these rows; else empty."""
    spec, given = config.evaluate, []
    given += ["evaluate.judge"] * (spec.judge is not None) + ["evaluate.metric"] * (spec.metric is not None)
    if not given:
        return ""
    if labels:
        why = "these rows have labels, whose probabilities are compared"
    elif not spec.answers:
        why = "evaluate.answers is 0"
    elif not any(row.answered for row in rows):
        why = "none of these rows ends in an answer"
    else:
        return ""
    have, them = ("has", "it") if len(given) == 1 else ("have", "them")
    return f"{' and '.join(given)} {have} no effect: {why}, so there are no replies to compare. Leave {them} out."


def prompt_of(row: Row) -> str:
    """The text before the row's last answer, without its system prompt."""
    return "\n".join(turn.text for turn in row.turns[:-1] if turn.role != "system")


def _parts(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cuts `order`, shortest first, so that each part, padded to its longest, has at most `most` tokens."""
    part: list[int] = []
    for index in order:
        if part and (len(part) + 1) * lengths[index] > most:
            yield part
            part = []
        part.append(index)
    if part:
        yield part

"""Has base, few-shot base and adapter answer the same held-out prompts, beside copies of training answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Encoder, Ids
from lorakeet.data.few_shot import BETWEEN, FewShot, choose_examples
from lorakeet.data.rows import Row, row_groups
from lorakeet.data.template import is_templated
from lorakeet.evaluate.baselines import constant_answer, nearest_answers
from lorakeet.evaluate.own_metric import OwnMetric
from lorakeet.evaluate.replies import Replies
from lorakeet.evaluate.report.compose import Answered
from lorakeet.models.generate.sample import sample
from lorakeet.models.inject import activate
from lorakeet.models.text.model import TextModel
from lorakeet.train.progress import counted
from lorakeet.workflows.planning.forecast_text_run import REPLY_TOKENS

BASE, ADAPTER, FEW_SHOT = "base", "adapter", "few-shot base"
LONGER = 1.5  # times the longest reference that a reply may have in tokens
LEAST_TOKENS = 16
PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
TOGETHER = 16  # prompts after each of which the time is looked at


@dataclass(frozen=True)
class Prompts:
    """The rows whose last answers are written anew: their indices, at most `limit` tokens each, one line if `one_line`."""

    rows: tuple[Row, ...]
    indices: tuple[int, ...]
    limit: int
    one_line: bool
    ending: str = ""  # which ends a reply, as it ended each example


@dataclass(frozen=True)
class Replier:
    """Writes replies of `text` with the adapter `name` on and off; `own` is a metric of the user's."""

    config: RunConfig
    text: TextModel
    encoder: Encoder
    console: Console
    name: str
    own: OwnMetric | None = None
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
        chosen = [index for index, (prompt, _) in found.items() if len(prompt) + limit <= context][: spec.answers]
        if not chosen:
            return None
        answers = [row.turns[-1].text.strip() for row in (*_taught(known), *(rows[index] for index in chosen))]
        templated = is_templated(rows[chosen[0]], self.encoder.tokenizer, self.encoder.spec)
        one_line = not templated and not any("\n" in answer for answer in answers)
        return Prompts(tuple(rows[index] for index in chosen), tuple(chosen), limit, one_line)

    def answered(self, rows: Sequence[Row], known: Sequence[Row]) -> Answered | None:
        """The replies of all systems to the prompts of `rows`; None if no row ends in an answer.

        `known` are training rows: the source of few-shot examples and of copied answers.
        """
        spec, prompts = self.config.evaluate, self.prompts(rows, known)
        if prompts is None:
            return None
        adapter = self.write(ADAPTER, prompts, seconds=spec.answer_seconds)
        wanted, count = len(prompts.rows), len(adapter.texts)
        prompts = replace(prompts, rows=prompts.rows[:count], indices=prompts.indices[:count])
        base = self.write(BASE, prompts)
        few_shot: Replies | None = None
        copies: tuple[Replies, ...] = ()
        taught = _taught(known)
        examples = choose_examples(taught, spec.examples, self.encoder, seed=spec.seed)
        if examples:
            few = FewShot(self.encoder, examples, limit=None if self.text.context is None else self.text.context - prompts.limit)
            note = f"sees up to {len(examples)} training rows with their answers before each prompt"
            templated = is_templated(prompts.rows[0], self.encoder.tokenizer, self.encoder.spec)
            ends = not templated and not any(BETWEEN in row.turns[-1].text.strip() for row in taught)
            shown = replace(prompts, rows=tuple(few.row(row) for row in prompts.rows), ending=BETWEEN if ends else "")
            few_shot = self.write(FEW_SHOT, shown, note=note)
        if spec.baselines and taught:
            answers = [self._reference(row) for row in taught]
            known_prompts, new_prompts = ([prompt_of(row) for row in some] for some in (taught, prompts.rows))
            copies = nearest_answers(known_prompts, answers, new_prompts, like=base), constant_answer(answers, like=base)
        return Answered(prompts.indices, adapter, base, few_shot, copies, self.own, wanted)

    def write(self, system: str, prompts: Prompts, *, seconds: float = math.inf, note: str = "") -> Replies:
        """The greedy replies of a system, or the first of them if `seconds` are over; at least TOGETHER."""
        activate(self.text.model, self.name if system == ADAPTER else None)
        questions = [found[0] for row in prompts.rows if (found := self.encoder.question(row)) is not None]
        until = self.clock() + seconds
        written: list[Ids] = []
        with counted(self.console, f"{system} writes replies", len(questions)) as advance:
            for start in range(0, len(questions), TOGETHER):
                if start and self.clock() > until:
                    break
                written += self._some(questions[start : start + TOGETHER], prompts.limit, advance)
        whole = [str(self.text.tokenizer.decode(ids, **PLAIN)).strip() for ids in written]
        ending = "\n" if prompts.one_line else prompts.ending
        texts = [text.split(ending, 1)[0].rstrip() for text in whole] if ending else whole
        cut = [len(ids) >= prompts.limit and text == full for ids, text, full in zip(written, texts, whole, strict=True)]
        if prompts.one_line:
            note = "; ".join(filter(None, (note, "its replies end with their first line, as all training answers do")))
        done = prompts.rows[: len(texts)]
        references = tuple(self._reference(row) for row in done)
        return Replies(system, tuple(texts), references, tuple(cut), row_groups(done), note)

    def _reference(self, row: Row) -> str:
        """The row's own last answer; a tool call as the template writes it."""
        if not row.turns[-1].extra:
            return row.turns[-1].text.strip()
        found = self.encoder.question(row)
        return "" if found is None else str(self.text.tokenizer.decode(found[1], **PLAIN)).strip()

    def _some(self, prompts: Sequence[Ids], limit: int, advance: Callable[[int], None]) -> list[Ids]:
        """The replies to a few prompts, as many at once as evaluation passes through the model together."""
        most = max(self.config.train.micro_tokens, REPLY_TOKENS)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, Ids] = {}
        for part in _parts(order, [len(prompt) + limit for prompt in prompts], most):
            replies = sample(self.text, [prompts[index] for index in part], max_tokens=limit, temperature=0.0)
            found |= dict(zip(part, replies, strict=True))
            advance(len(part))
        return [found[index] for index in range(len(prompts))]


def _taught(rows: Sequence[Row]) -> list[Row]:
    """The rows that end in an answer."""
    return [row for row in rows if row.turns[-1].supervised and row.turns[-1].role]


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

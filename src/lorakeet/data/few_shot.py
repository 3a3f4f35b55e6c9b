"""Few-shot prompts: training rows with their answers before a row's own prompt, so that an untrained model knows the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorakeet.data.chat import Encoder
from lorakeet.data.rows import Row, Turn
from lorakeet.data.template import is_templated

SHARE = 0.5  # of a few-shot row that the examples may take, or more where the row itself needs less
WIDE = 1024  # tokens of a few-shot row, where data.max_tokens is less: that limits training rows, not what a base reads
MOST_READ = 1000  # training rows of which examples are chosen
BETWEEN = "\n\n"  # after an example, where no chat template separates turns


@dataclass(frozen=True)
class FewShot:
    """`examples` are put before a row as long as it fits; the names of the labels, where there are any, come first.

    `encoder` encodes few-shot rows (`wider`), `limit` is what they have in its place if that is less.
    """

    encoder: Encoder
    examples: tuple[Row, ...]
    limit: int | None = None  # tokens of the whole row

    def row(self, row: Row) -> Row:
        """The row behind as many examples as fit: all, half of them, a quarter and so on, or none."""
        count, limit = len(self.examples), self.encoder.spec.max_tokens
        while count:
            found = self._behind(row, self.examples[:count])
            if self.encoder.tokens_of(found) <= min(self.limit or limit, limit):
                return found
            count //= 2
        return row

    def _behind(self, row: Row, examples: Sequence[Row]) -> Row:
        templated = is_templated(row, self.encoder.tokenizer, self.encoder.spec)
        first = [turn for turn in row.turns if turn.role == "system"]
        shown = [_shown(turn, templated) for example in examples for turn in example.turns if turn.role != "system"]
        if self.encoder.labels:
            shown[0] = _with_prefix(shown[0], f"The answer is one of: {', '.join(self.encoder.labels)}.{BETWEEN}")
        return replace(row, turns=(*first, *shown, *(turn for turn in row.turns if turn.role != "system")))


def widest(most: int, context: int | None) -> int:
    """Tokens of a few-shot row: up to WIDE within the model's `context`, but no fewer than other rows have at `most`."""
    return max(most, WIDE if context is None else min(WIDE, context))


def wider(encoder: Encoder, context: int | None) -> Encoder:
    """The encoder of few-shot rows, which have up to `widest` tokens."""
    limit = widest(encoder.spec.max_tokens, context)
    return Encoder(encoder.tokenizer, replace(encoder.spec, max_tokens=limit), encoder.labels)


def choose_examples(rows: Sequence[Row], count: int, encoder: Encoder, *, seed: int, own: int) -> tuple[Row, ...]:
    """Up to `count` rows, drawn with `seed`: of each label as many where rows have labels; at least one of each, if they fit.

    Fewer where rows of usual length do not fit into SHARE of what `encoder` takes, or what is left of it beside a row of `own`
    tokens. Rows that end in no answer, or have tools, are never chosen.
    """
    limit = max(SHARE * encoder.spec.max_tokens, encoder.spec.max_tokens - own)
    wanted = max(count, len(encoder.labels)) if count else 0
    order = np.random.default_rng([seed, 3]).permutation(len(rows))[: MOST_READ if wanted else 0]
    usable = [row for index in order if (row := rows[index]).answered and not row.tools]
    lengths = [encoder.tokens_of(row) for row in usable]
    if not usable:
        return ()
    typical = float(np.median(lengths))
    wanted = min(wanted, int(limit // typical))  # as many as fit of rows of usual length: short ones are not preferred
    piles: dict[str | None, list[tuple[Row, int]]] = {}
    for row, length in zip(usable, lengths, strict=True):
        piles.setdefault(row.label, []).append((row, length))
    chosen: list[Row] = []
    used = 0.0
    waiting = [iter(pile) for pile in piles.values()]
    while waiting and len(chosen) < wanted:
        for pile in list(waiting):
            found = next(((row, length) for row, length in pile if used + length <= limit), None)
            if found is None:
                waiting.remove(pile)
                continue
            chosen.append(found[0])
            used += found[1]
            if len(chosen) == wanted:
                break
    return tuple(chosen)


def _shown(turn: Turn, templated: bool) -> Turn:
    """A turn of an example: no target, and followed by an empty line if it is an answer without a chat template."""
    ending = BETWEEN if turn.supervised and not templated else ""
    return replace(turn, text=turn.text + ending, supervised=False)


def _with_prefix(turn: Turn, prefix: str) -> Turn:
    return replace(turn, text=prefix + turn.text)

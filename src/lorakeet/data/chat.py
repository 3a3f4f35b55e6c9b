"""Encodes rows as token ids with the mask of target tokens, the same for training, likelihood scoring and inference.

A prompt is encoded alone, exactly as at inference; the ids of the completion follow. Encoding both together could merge
tokens across the border, and the model would be trained on a prompt that it never sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorakeet.data.rows import Row, Turn
from lorakeet.data.shapes import label_text
from lorakeet.data.spec import DataSpec
from lorakeet.data.template import Tokenizer, decoded, encoded, is_templated, render, uses_template
from lorakeet.errors import ConfigError, DataError, Remedy, nearest, spelt

if TYPE_CHECKING:
    from rich.text import Text

Ids = NDArray[np.int64]
_SHORTEN = Remedy("data.too_long", "truncate", "Shorten longer rows")
_SLACK = 8  # tokens by which a label's completion may differ from the label's own encoding, end of turn included


@dataclass(frozen=True, eq=False)
class Example:
    """One row as tokens: where `supervised[t]` is true, token t is a target, predicted from the tokens before it."""

    ids: Ids  # (tokens,)
    supervised: NDArray[np.bool_]  # (tokens,)
    key: str
    label: int | None
    truncated: bool


@dataclass(frozen=True, eq=False)
class Candidates:
    """One labelled row for likelihood scoring: the prompt, and each label's completion with its end-of-turn token."""

    prompt: Ids
    completions: tuple[Ids, ...]
    key: str
    label: int | None
    truncated: bool


@dataclass(frozen=True)
class Encoded:
    """The examples of a set of rows, in order, and which rows were too long."""

    examples: tuple[Example, ...]
    truncated: int
    dropped: tuple[str, ...]  # sources of the rows left out


@dataclass(frozen=True)
class _Fitted:
    """A row that fits, with its ids and targets."""

    row: Row
    tokens: tuple[Ids, NDArray[np.bool_]]


class Encoder:
    """Encodes rows with one tokenizer, one spec and one order of labels (empty where rows have none)."""

    def __init__(self, tokenizer: Tokenizer, spec: DataSpec, labels: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.labels = tuple(labels)
        self._last: tuple[str, list[int]] = ("", [])
        uses_template(tokenizer, spec)  # raises for a missing template before the first row
        first, bos = encoded(tokenizer, "a", add_special_tokens=True)[0], tokenizer.bos_token_id
        self._bos: list[int] = [first] if bos is not None and first == bos else []
        self._longest_label = max((len(self._encode(label_text(label, spec))) for label in self.labels), default=0)

    def encode(self, row: Row) -> Example | None:
        """Encodes the row; None if it is too long and `too_long` is "drop"."""
        label = self._label_index(row)
        fitted = self._fit(row)
        if fitted is None:
            return None
        (whole, targets), limit = fitted.tokens, self.spec.max_tokens
        ids, supervised, cut = whole[:limit], targets[:limit], len(whole) > limit
        if not supervised.any():
            raise DataError(f"{row.source}: no target token is left; expected an answer, or a text of at least two tokens.")
        return Example(ids, supervised, row.key, label, truncated=cut or fitted.row is not row)

    def candidates(self, row: Row) -> Candidates | None:
        """Encodes the prompt and each label's completion; prompt + true completion are the ids of `encode(row)`.

        None if the row is too long and `too_long` is "drop".
        """
        if not self.labels:
            raise DataError(f"{row.source}: likelihood scoring needs labels, and these rows have none.")
        fitted = self._fit(row)
        if fitted is None:
            return None
        pairs = [self._prompt_and_answer(self._with_label(fitted.row, label)) for label in self.labels]
        prompt = pairs[0][0]
        for label, (other, _) in zip(self.labels, pairs, strict=True):
            if not np.array_equal(prompt, other):
                raise DataError(f"{row.source}: the prompt changes with the answer {label!r}, so answers cannot be compared.")
        answers = tuple(answer for _, answer in pairs)
        return Candidates(prompt, answers, row.key, self._label_index(row), truncated=fitted.row is not row)

    def question(self, row: Row) -> tuple[Ids, Ids] | None:
        """The ids before the row's last answer, and those of the answer; None if the row ends in no answer, or is left out.

        They are the ids of `encode(row)`.
        """
        fitted = self._fit(row) if row.answered else None
        return None if fitted is None else self._prompt_and_answer(fitted.row)

    def longest(self, examples: Iterable[Example]) -> int:
        """The most tokens of one of `examples`, whichever label it ends with; 0 for none."""
        most = max((len(example.ids) for example in examples), default=0)
        return min(most + self._longest_label + _SLACK, max(most, self.spec.max_tokens)) if self.labels else most

    def shortened(self, row: Row) -> Row | None:
        """The row that `encode(row)` encodes: with less of the user's text if it is too long; None if it is left out."""
        fitted = self._fit(row)
        return None if fitted is None else fitted.row

    def tokens_of(self, row: Row) -> int:
        """The tokens of the whole row, with its longest label if it is near data.max_tokens."""
        return self._length(_Fitted(row, self._tokens(row)))

    def _label_index(self, row: Row) -> int | None:
        if row.label is None or not self.labels:
            return None
        if row.label not in self.labels:
            known = ", ".join(map(repr, self.labels))
            guess = nearest(row.label, self.labels)
            raise DataError(f"{row.source}: the label {row.label!r} is unseen in training, which has {known}.{guess}")
        return self.labels.index(row.label)

    def _with_label(self, row: Row, label: str) -> Row:
        answer = replace(row.turns[-1], text=label_text(label, self.spec))
        return replace(row, turns=(*row.turns[:-1], answer), label=label)

    def _tokens(self, row: Row) -> tuple[Ids, NDArray[np.bool_]]:
        """All ids of the row and the mask of targets, up to the last target."""
        rendered = render(row, self.tokenizer, self.spec)
        ids: list[int] = []
        targets: list[bool] = []
        done = 0
        for start, end in rendered.spans:
            for stop, target in ((start, False), (end, True)):
                new = self._extend(ids, rendered.text[:done], rendered.text[done:stop])
                ids += new
                targets += [target] * len(new)
                done = stop
        if rendered.ends:
            ids.append(self._end_of_text())
            targets.append(True)
        elif self.spec.supervise == "all" and row.label is None:
            ids += self._extend(ids, rendered.text[:done], rendered.text[done:])
        bos = self._first(row)
        everything = self.spec.supervise == "all"
        supervised = np.ones(len(bos) + len(ids), bool) if everything else np.array([False] * len(bos) + targets, bool)
        supervised[:1] = False  # nothing predicts the first token
        return np.array(bos + ids, np.int64), supervised

    def _prompt_and_answer(self, row: Row) -> tuple[Ids, Ids]:
        """The ids before the only supervised span of a labelled row, and those of the span."""
        rendered = render(row, self.tokenizer, self.spec)
        start, end = rendered.spans[-1]
        prompt = self._encode(rendered.text[:start])
        rest = self._extend(prompt, rendered.text[:start], rendered.text[start:end])
        if rendered.ends:
            rest = [*rest, self._end_of_text()]
        return np.array(self._first(row) + prompt, np.int64), np.array(rest, np.int64)

    def _first(self, row: Row) -> list[int]:
        """The BOS token, if this tokenizer puts one before raw text; chat templates write their own."""
        return [] if is_templated(row, self.tokenizer, self.spec) else self._bos

    def _encode(self, text: str) -> list[int]:
        return encoded(self.tokenizer, text, add_special_tokens=False) if text else []

    def _beginning(self, text: str) -> list[int]:
        """The ids of a row's beginning; the last one is remembered, since each label of a row is encoded behind the same."""
        last = self._last  # read once: another thread may encode a row meanwhile
        if text != last[0]:
            last = self._last = text, self._encode(text)
        return list(last[1])

    def _extend(self, ids: list[int], before: str, piece: str) -> list[int]:
        """The ids of `piece` such that `ids` (of `before`) followed by them decode to `before + piece`."""
        if not piece:
            return []
        whole = self._encode(before + piece) if before else self._beginning(piece)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        # A token would cross the border, so the piece is encoded alone. SentencePiece adds a space before a text; to avoid
        # that, the piece is encoded behind a character with which its first token does not merge.
        wanted = self._decode(whole)
        for sign in ("", "\n", ".", "a"):
            head, both = self._encode(sign), self._encode(sign + piece)
            if both[: len(head)] == head and self._decode(ids + both[len(head) :]) == wanted:
                return both[len(head) :]
        raise DataError(
            f"The tokenizer cannot encode {piece[:40]!r} as the continuation of {before[-40:]!r}; "
            "end the prompt with a space or a line break, or start the answer with one."
        )

    def _decode(self, ids: list[int]) -> str:
        return decoded(self.tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _end_of_text(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "The tokenizer has no end-of-text token, so a model cannot learn where an answer ends; "
                "set tokenizer.eos_token and save it with the model."
            )
        return int(self.tokenizer.eos_token_id)

    def _fit(self, row: Row) -> _Fitted | None:
        """The row itself if it fits; otherwise, by `too_long`: shortened, None, or a DataError."""
        limit = self.spec.max_tokens
        fitted = _Fitted(row, self._tokens(row))
        tokens = self._length(fitted)
        if tokens <= limit:
            return fitted
        if self.spec.too_long == "drop":
            return None
        if self.spec.too_long == "refuse":
            raise DataError(
                f"{row.source}: the row has {tokens} tokens, and data.max_tokens is {limit}. Shorten it, "
                f"raise {spelt('data.max_tokens')}, or set {spelt('data.too_long')} to truncate or drop.",
                code="row-too-long",
                values={"limit": limit},
                remedies=[_SHORTEN],
            )
        if all(turn.supervised and not turn.role for turn in row.turns):
            return fitted  # raw text is cut by tokens
        return self._shorten(row)

    def _length(self, fitted: _Fitted) -> int:
        """Tokens of the row. A labelled row close to the limit counts with its longest label, so that every label fits."""
        length, label = len(fitted.tokens[0]), fitted.row.label
        if label is None or not self.labels or length + self._longest_label + _SLACK <= self.spec.max_tokens:
            return length
        others = (len(self._tokens(self._with_label(fitted.row, other))[0]) for other in self.labels if other != label)
        return max([length, *others])

    def _shorten(self, row: Row) -> _Fitted:
        """Cuts the end of the user's free text, longest turn first, until the row fits; answers stay whole."""
        limit = self.spec.max_tokens
        users = [number for number, turn in enumerate(row.turns) if turn.role == "user"]

        def cut(number: int, characters: int) -> _Fitted | None:
            shorter = _cut(row, number, characters)
            fitted = _Fitted(shorter, self._tokens(shorter))
            return fitted if len(fitted.tokens[0]) <= limit and self._length(fitted) <= limit else None

        for number in sorted(users, key=lambda number: (-len(row.turns[number].free_text), number)):
            best = cut(number, 1)
            if best is None:
                row = _cut(row, number, 1)
                continue
            fits, beyond = 1, len(row.turns[number].free_text)
            while beyond - fits > 1:
                middle = (fits + beyond) // 2
                longer = cut(number, middle)
                fits, beyond, best = (fits, middle, best) if longer is None else (middle, beyond, longer)
            return best
        tokens = self._length(_Fitted(row, self._tokens(row)))
        raise DataError(
            f"{row.source}: even without the user's text the row has {tokens} tokens, and data.max_tokens is {limit}; "
            f"the prompt template and the answers alone are longer. Raise {spelt('data.max_tokens')} or shorten them."
        )


def encode_rows(rows: Iterable[Row], encoder: Encoder) -> Encoded:
    """Encodes the rows in order. Raises DataError if all were dropped."""
    examples: list[Example] = []
    dropped: list[str] = []
    for row in rows:
        example = encoder.encode(row)
        if example is None:
            dropped.append(row.source)
        else:
            examples.append(example)
    if dropped and not examples:
        raise DataError(
            f"All {len(dropped)} rows are longer than data.max_tokens ({encoder.spec.max_tokens}) and were dropped; "
            f"raise {spelt('data.max_tokens')} or set {spelt('data.too_long', 'truncate')}.",
            code="row-too-long",
            values={"limit": encoder.spec.max_tokens},
            remedies=[_SHORTEN],
        )
    return Encoded(tuple(examples), sum(example.truncated for example in examples), tuple(dropped))


def show_example(example: Example, tokenizer: Tokenizer) -> Text:
    """The example as text for a terminal: target tokens in bold green, the others dim."""
    from rich.text import Text

    text = Text()
    borders = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1).tolist(), len(example.ids)]
    for start, end in pairwise(borders):
        part = decoded(tokenizer, example.ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(str(part), style="bold green" if example.supervised[start] else "dim")
    text.append(f"\n[{len(example.ids)} tokens, {int(example.supervised.sum())} targets]", style="italic")
    return text


def _cut(row: Row, number: int, characters: int) -> Row:
    """The row with one turn's free text cut to its first `characters`."""
    turn = row.turns[number]
    start, end = turn.free or (0, len(turn.text))
    kept = turn.text[start:end][:characters].rstrip() or turn.text[start : start + 1]
    shorter = Turn(turn.role, turn.text[:start] + kept + turn.text[end:], turn.supervised, (start, start + len(kept)))
    return replace(row, turns=(*row.turns[:number], shorter, *row.turns[number + 1 :]))

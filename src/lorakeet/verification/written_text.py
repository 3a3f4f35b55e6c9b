"""A text that a server wrote, as the live model reads it: token by token, how much likelier it finds its own.

    prompt │ a token that the server wrote ── the live model's likeliest there ── nats between both, and of its log-probability
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lorakeet.data.template import decoded
from lorakeet.models.generate.sample import end_ids
from lorakeet.planning.check import GREEDY_TOKENS
from lorakeet.verification.artefact import InTorch
from lorakeet.verification.rounding import Reported
from lorakeet.verification.server_apis import TOP, Step, Token, Written

_READ_TOKENS = 8 * TOP  # of the live model's likeliest tokens, before all of them are
_PIECE = "\ufffd"  # how a piece of a character reads
_SURE = 1.0  # nats between the likeliest piece and the next


@dataclass(frozen=True)
class _WrittenStep:
    """One token that the server wrote: how much likelier, in nats, the live model finds its own, and both as text."""

    behind: float
    here: str
    there: str
    difference: float | None = None  # of its log-probability; None where it is not reported


@dataclass
class TextReading:
    """How the live model reads a text that the server wrote; the last step has no token if the live model has none like it."""

    reported: Reported
    steps: list[_WrittenStep] = field(default_factory=list)
    tokens: int = 0

    def up_to(self, most: float) -> TextReading:
        """The same up to the first token that the live model finds worse than its own by more than `most` nats."""
        end = next((number for number, step in enumerate(self.steps) if step.behind > most), len(self.steps)) + 1
        tokens = min(self.tokens, end)
        ids = self.reported.ids[: len(self.reported.ids) - self.tokens + tokens]
        places = {place: known for place, known in self.reported.places.items() if place < len(ids)}
        return TextReading(Reported(ids, places), self.steps[:end], tokens)

    @property
    def differences(self) -> list[float]:
        """Of the log-probabilities that are reported."""
        return [step.difference for step in self.steps if step.difference is not None]

    @property
    def gap(self) -> float:
        """The largest number of nats by which a token is worse than the live model's own."""
        return max((step.behind for step in self.steps), default=0.0)

    @property
    def detail(self) -> str:
        """A sentence on that token; empty if there is none."""
        if self.gap <= 0:
            return ""
        number, step = max(enumerate(self.steps), key=lambda one: one[1].behind)
        said = f"{step.here!r} here, {step.there!r} there, {step.behind:.3g} nats off."
        return f"The first diverging token is number {number}: {said}"


def read_text(live: InTorch, prompt: list[int], written: Written) -> TextReading:
    """Follows the server's text token by token, as far as the live model has such tokens.

    It ends where a piece of a character is reported by its text alone, and the live model is not sure which one: then what
    follows cannot be compared either.
    """
    if not written.text and not written.steps:
        return _ended_at_once(live, prompt)
    reading = TextReading(Reported(list(prompt), {}))
    ids, tokenizer = reading.reported.ids, live.text.tokenizer
    vocabulary = range(live.text.model.config.get_text_config().vocab_size)
    written = replace(written, steps=_before_joined_pieces(tokenizer, written.steps, vocabulary))
    steps: Sequence[Step | None] = written.steps or [None] * GREEDY_TOKENS
    rest = written.text
    numbers = [step.token.number for step in written.steps if step.token.number is not None]
    by_id = bool(numbers) and len(numbers) == len(written.steps) and all(number in vocabulary for number in numbers)
    known = live.logits([*prompt, *numbers], len(numbers) + 1) if by_id else None
    for number, step in enumerate(steps):
        if step is None and not rest:
            break
        after = live.logits(ids, 1)[0] if known is None else known[number]  # all in one pass, where the ids are reported
        place = TextPosition(tokenizer, after.log_softmax(-1), ids[-1])
        unsure = place.begins_a_piece if step is None else _ambiguous(step.token) and not place.sure_of_its_piece
        if unsure:
            break
        ours, (theirs, text) = int(place.after.argmax()), place.next(rest) if step is None else place.find(step.token)
        behind = math.inf if theirs is None else float(place.after[ours] - place.after[theirs])
        difference = None
        if step is not None and theirs is not None:
            if likeliest := place.reported(step.top):
                reading.reported.places[len(ids) - 1] = likeliest
            if step.token.logprob is not None:
                difference = abs(float(place.after[theirs]) - step.token.logprob)
        there = rest[:12] if step is None else step.token.text
        reading.steps.append(_WrittenStep(behind, decoded(tokenizer, [ours]), there, difference))
        if theirs is None:
            break
        ids.append(theirs)
        rest = rest[len(text) :]
        reading.tokens += 1
    return reading


def _ended_at_once(live: InTorch, prompt: list[int]) -> TextReading:
    """The reading of a text without a token: the live model is to end there too, by its likeliest token that shows no text."""
    reading = TextReading(Reported(list(prompt), {}))
    tokenizer, after = live.text.tokenizer, live.logits(prompt, 1)[0]
    ends = [number for number in {*end_ids(live.text), *tokenizer.all_special_ids} if 0 <= number < len(after)]
    if ends:
        ours, theirs = int(after.argmax()), max(ends, key=lambda number: float(after[number]))
        reading.steps.append(_WrittenStep(float(after[ours] - after[theirs]), decoded(tokenizer, [ours]), "the end of the text"))
        reading.reported.ids.append(theirs)
        reading.tokens = 1
    return reading


def _before_joined_pieces(tokenizer: Any, steps: tuple[Step, ...], vocabulary: range) -> tuple[Step, ...]:
    """The steps before the first whose text is not its token's: llama.cpp reports a piece of a character with the next token."""
    for number, step in enumerate(steps):
        if step.token.number not in vocabulary or step.token.by_id:  # ids of no token are compared further on
            continue
        text = decoded(tokenizer, [step.token.number])
        if _PIECE in text + step.token.text and text != step.token.text:
            return steps[:number]
    return steps


@dataclass(frozen=True)
class TextPosition:
    """A place of a text as the live model sees it, where tokens that a server tells by their text are looked up."""

    tokenizer: Any
    after: Tensor  # (vocabulary,), the larger the likelier
    before: int  # the token that stands before it

    @property
    def begins_a_piece(self) -> bool:
        """Whether the live model's next token is a piece of a character, which no text can show."""
        return _PIECE in decoded(self.tokenizer, [int(self.after.argmax())])

    @property
    def sure_of_its_piece(self) -> bool:
        """Whether its likeliest token is a piece of a character, and any other piece is clearly less likely."""
        if not self.begins_a_piece:
            return False
        numbers = self.after.topk(min(_READ_TOKENS, len(self.after))).indices.tolist()
        first, *others = (number for number in numbers if _PIECE in decoded(self.tokenizer, [number]))
        return all(float(self.after[first] - self.after[other]) > _SURE for other in others[:1])

    def find(self, token: Token) -> tuple[int | None, str]:
        """The id of a token, and its text: as reported, or else the likeliest of the live model's with that text."""
        if token.number is not None:
            return token.number if 0 <= token.number < len(self.after) else None, token.text
        return self._likeliest(lambda text: text == token.text)

    def next(self, rest: str) -> tuple[int | None, str]:
        """The likeliest token with which `rest` begins, and its text."""
        return self._likeliest(lambda text: bool(text) and rest.startswith(text))

    def reported(self, top: Sequence[Token]) -> dict[int, float]:
        """Log-probabilities by id.

        Pieces of characters have one text in common, so they are left out if no ids are reported, and so is a position where one
        of them is the likeliest here or there.
        """
        found: dict[int, float] = {}
        if not top or (self.begins_a_piece and any(token.number is None for token in top)):
            return found
        likeliest = max(top, key=lambda token: -math.inf if token.logprob is None else token.logprob)
        if _ambiguous(likeliest):
            return found
        for token in top:
            number = None if _ambiguous(token) else self.find(token)[0]
            if number is not None and token.logprob is not None and 0 <= number < len(self.after):
                found.setdefault(number, token.logprob)
        return found

    def _likeliest(self, fits: Callable[[str], bool]) -> tuple[int | None, str]:
        decode = self.tokenizer.decode
        for count in (min(_READ_TOKENS, len(self.after)), len(self.after)):  # mostly the first few hold it
            for number in self.after.topk(count).indices.tolist():
                # as servers write it: alone, or as what it adds to the text, which may begin with a blank
                joined = decode([self.before, number]).removeprefix(decode([self.before]))
                for text in (decode([number]), decode([number], clean_up_tokenization_spaces=False), joined):
                    if fits(text):
                        return number, text
        return None, ""


def _ambiguous(token: Token) -> bool:
    return token.number is None and _PIECE in token.text

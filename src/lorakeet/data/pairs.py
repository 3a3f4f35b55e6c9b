"""Rows with two answers as tokens, and micro-batches that keep both together.

The examples of compared answers stand in pairs: number 2i has the chosen answer, 2i + 1 the rejected one. Both begin with the
same prompt, to the token. Pairs of one long prompt have a batch of their own, where the prompt is computed once for all answers
(data/prefix); the others are packed together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lorakeet.data.chat import Encoded, Encoder, Example
from lorakeet.data.pack import Batch, even_bins, pack_examples, padded_bins
from lorakeet.data.prefix import UNIT, BatchLimits, common_prefix
from lorakeet.data.rows import Row, common_turns
from lorakeet.data.template import WITHOUT
from lorakeet.errors import DataError, spelt


def encode_pair(row: Row, encoder: Encoder) -> tuple[Example, Example] | None:
    """The row with its chosen and with its rejected answer; None if one of them is too long and `too_long` is "drop".

    Only the prompt, the turns that both begin with, is shortened, and equally for both. Raises DataError where the turns after
    it are too long, where the chat template changes the prompt with the answer, and where both answers of a pair have the same
    tokens.
    """
    other = row.other
    if other is None:
        raise DataError(f"{row.source} has one answer only; two are compared, in the columns chosen and rejected.")
    fitted = _shortened(row, other, encoder)
    if fitted is None:
        return None
    found = []
    for each, given in zip(fitted, (row, other), strict=True):
        example = encoder.encode(each)
        if example is None:
            return None
        cut = [turn.text for turn in each.turns] != [turn.text for turn in given.turns]
        found.append(replace(example, key=row.key, truncated=cut))
    chosen, rejected = found
    starts = [_prompt_tokens(each) for each in found]
    if not np.array_equal(chosen.ids[: starts[0]], rejected.ids[: starts[1]]):
        raise DataError(
            f"{row.source}: the prompt has other tokens before the chosen answer than before the rejected one, so the answers "
            f"cannot be compared. The chat template changes the prompt with the answer; set {WITHOUT.flag}.",
            remedies=[WITHOUT],
        )
    if row.desirable is None and np.array_equal(chosen.ids, rejected.ids):  # kto's second answer is that of another row
        raise DataError(
            f"{row.source}: chosen and rejected have the same tokens, so neither is preferred. The chat template leaves out what "
            "differs, such as white space; remove the row or change one of them."
        )
    return chosen, rejected


def _shortened(row: Row, other: Row, encoder: Encoder) -> tuple[Row, Row] | None:
    """Both rows with the same, perhaps shorter prompt, so that each fits; None if one is to be left out."""
    prompt = common_turns(row.turns, other.turns)
    both, side, fitting = [_with_fixed_end(each, prompt) for each in (row, other)], 0, 0
    while fitting < 2:
        found = encoder.shortened(both[side])
        if found is None:
            return None
        if found is both[side]:
            side, fitting = 1 - side, fitting + 1
        else:
            both, fitting = [replace(each, turns=(*found.turns[:prompt], *each.turns[prompt:])) for each in both], 0
    return both[0], both[1]


def _with_fixed_end(row: Row, prompt: int) -> Row:
    """The row where no text after the first `prompt` turns can be shortened: one character of it is free."""
    end = (replace(turn, free=(0, 1)) if turn.role == "user" else turn for turn in row.turns[prompt:])
    return replace(row, turns=(*row.turns[:prompt], *end))


def encode_pairs(rows: Iterable[Row], encoder: Encoder) -> Encoded:
    """The examples of all rows, in pairs, in order. Raises DataError if all were dropped.

    `truncated` counts rows, `dropped` names those left out.
    """
    examples: list[Example] = []
    dropped: list[str] = []
    truncated, given = 0, list(rows)
    for row in given:
        found = encode_pair(row, encoder)
        if found is None:
            dropped.append(row.source)
        else:
            examples += found
            truncated += any(example.truncated for example in found)
    if dropped and not examples:
        raise DataError(
            f"All {len(dropped)} rows are longer than data.max_tokens ({encoder.spec.max_tokens}) with "
            f"{_too_long(given, encoder)}, and were dropped; raise {spelt('data.max_tokens')}, or shorten them: "
            f"{spelt('data.too_long', 'truncate')} "
            "cuts prompts alone."
        )
    return Encoded(tuple(examples), truncated, tuple(dropped))


def _too_long(rows: Sequence[Row], encoder: Encoder) -> str:
    """With which answers all of `rows` are too long, in words."""
    chosen, rejected = ([encoder.shortened(each) is None for each in some] for some in (rows, [row.other or row for row in rows]))
    if rows[0].desirable is not None or all(chosen) == all(rejected):  # kto's second answer is that of another row
        return "one of their answers"
    return f"their {'chosen' if all(chosen) else 'rejected'} answers"


def pair_batches(examples: Sequence[Example], limits: BatchLimits, *, shares: bool, padded: bool = False) -> list[Batch]:
    """Splits pairs, neighbours in `examples`, into batches within the limits; a larger pair has one of its own. Deterministic.

    With `shares`, pairs of one prompt have batches of their own where that saves more tokens than its passes cost: then the
    prompt is computed once for each batch. Where rows are `padded`, padding counts.
    """
    if padded:
        longest = [max(len(examples[at].ids), len(examples[at + 1].ids)) for at in range(0, len(examples), 2)]
        return [_packed(examples, chosen) for chosen in padded_bins(longest, max(1, limits.tokens // 2))]
    pairs = _Pairs(examples, limits, shares=shares)
    every = list(range(len(examples) // 2))
    bins = min((pairs.apart(every), pairs.by_prompt(every)), key=lambda bins: sum(map(pairs.cost, bins)))
    return [_packed(examples, chosen) for chosen in bins]


class _Pairs:
    """The tokens of pairs by number, and how they are split into batches; a batch is a list of these numbers."""

    def __init__(self, examples: Sequence[Example], limits: BatchLimits, *, shares: bool) -> None:
        both = [(examples[at], examples[at + 1]) for at in range(0, len(examples), 2)]
        self.lengths = [len(chosen.ids) + len(rejected.ids) for chosen, rejected in both]
        self.targets = [int(chosen.supervised.sum() + rejected.supervised.sum()) for chosen, rejected in both]
        self.common = [common_prefix(chosen.ids, rejected.ids) if shares else 0 for chosen, rejected in both]
        self.prompts = [
            chosen.ids[: min(common, _prompt_tokens(chosen))].tobytes()
            for (chosen, _), common in zip(both, self.common, strict=True)
        ]
        self.limits = limits

    def apart(self, pairs: Sequence[int]) -> list[list[int]]:
        """Batches of pairs of any prompts, whose prompts all count."""
        return _chosen(pairs, even_bins([self.lengths[pair] for pair in pairs], self.limits.tokens))

    def by_prompt(self, pairs: Sequence[int]) -> list[list[int]]:
        """Batches where pairs of one prompt are together if that costs less than among others; those fill `apart` batches."""
        groups: dict[bytes, list[int]] = defaultdict(list)
        for pair in pairs:
            groups[self.prompts[pair]].append(pair)
        found, others = [], []
        for group in groups.values():
            own = self._together(group)
            if sum(map(self.cost, own)) < self._among_others(group):
                found += own
            else:
                others += group
        return [*self.apart(others), *found] if others else found

    def cost(self, batch: Sequence[int]) -> int:
        """The cost of a batch in tokens: the computed ones and the pass."""
        return sum(self.lengths[pair] for pair in batch) - (2 * len(batch) - 1) * self._shared(batch) + self.limits.a_pass

    def _together(self, group: Sequence[int]) -> list[list[int]]:
        """Batches of pairs of one prompt, each pair with the share of a batch that it fills, in UNITs."""
        most, shared = self.limits.tokens, self._shared(group)
        filled = [
            max(
                (self.lengths[pair] - 2 * shared) * UNIT // max(1, most - shared),
                self.targets[pair] * UNIT // most,
                self.lengths[pair] * UNIT // (self.limits.times * most),
            )
            for pair in group
        ]
        return _chosen(group, even_bins([min(each, UNIT + 1) for each in filled], UNIT, UNIT >> 12))

    def _among_others(self, group: Sequence[int]) -> float:
        """The cost of the pairs in batches with others: of each pass only the share that they fill."""
        passes = sum(min(1.0, self.lengths[pair] / self.limits.tokens) for pair in group)
        return sum(self.lengths[pair] for pair in group) + passes * self.limits.a_pass

    def _shared(self, batch: Sequence[int]) -> int:
        """Tokens that all rows of the batch begin with, and that count once."""
        if len(batch) == 1:
            return self.common[batch[0]]
        first = self.prompts[batch[0]]
        return len(first) // _ID_BYTES if all(self.prompts[pair] == first for pair in batch) else 0


_ID_BYTES = np.dtype(np.int64).itemsize


def _prompt_tokens(example: Example) -> int:
    """Tokens before the first target."""
    return int(np.flatnonzero(example.supervised)[0])


def _chosen(numbers: Sequence[int], bins: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[numbers[at] for at in places] for places in bins]


def _packed(examples: Sequence[Example], pairs: Sequence[int]) -> Batch:
    return pack_examples([examples[number] for pair in sorted(pairs) for number in (2 * pair, 2 * pair + 1)])

"""Rows with two answers as tokens, and micro-batches that keep both together.

The examples of a preference run stand in pairs: number 2i has the chosen answer, 2i + 1 the rejected one. Both begin with the
same prompt, to the token. A pair with a long prompt has a batch of its own, where the prompt is computed once for both answers
(data/prefix); the others are packed together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lorakeet.data.chat import Encoded, Encoder, Example
from lorakeet.data.pack import Batch, even_bins, pack_examples, padded_bins
from lorakeet.data.preferences import common_turns
from lorakeet.data.prefix import common_prefix
from lorakeet.data.rows import Row
from lorakeet.errors import DataError


def encode_pair(row: Row, encoder: Encoder) -> tuple[Example, Example] | None:
    """The row with its chosen and with its rejected answer; None if one of them is too long and `too_long` is "drop".

    Only the prompt, the turns that both begin with, is shortened, and equally for both. Raises DataError where the turns after
    it are too long, where the chat template changes the prompt with the answer, and where both answers of a pair have the same
    tokens.
    """
    other = row.other
    if other is None:
        raise DataError(f"{row.source} has one answer only; a preference needs two, in the columns chosen and rejected.")
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
    starts = [int(np.flatnonzero(each.supervised)[0]) for each in found]
    if not np.array_equal(chosen.ids[: starts[0]], rejected.ids[: starts[1]]):
        raise DataError(
            f"{row.source}: the prompt has other tokens before the chosen answer than before the rejected one, so the answers "
            "cannot be compared. The chat template changes the prompt with the answer; set --data.chat_template off."
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
    truncated = 0
    for row in rows:
        found = encode_pair(row, encoder)
        if found is None:
            dropped.append(row.source)
        else:
            examples += found
            truncated += any(example.truncated for example in found)
    if dropped and not examples:
        raise DataError(
            f"All {len(dropped)} rows are longer than data.max_tokens ({encoder.spec.max_tokens}) with one of their answers, and "
            "were dropped; raise --data.max_tokens or set --data.too_long truncate."
        )
    return Encoded(tuple(examples), truncated, tuple(dropped))


def pair_batches(
    examples: Sequence[Example], max_tokens: int, *, shares: bool, a_pass: int, padded: bool = False
) -> list[Batch]:
    """Splits pairs, neighbours in `examples`, into batches of at most `max_tokens` computed tokens. Deterministic.

    A larger pair is a batch of its own. With `shares`, a pair whose prompt has more than `a_pass` tokens is batched alone, or
    with pairs of the same prompt: then the prompt is computed once for the batch. Where rows are `padded`, padding counts.
    """
    lengths = [(len(examples[at].ids), len(examples[at + 1].ids)) for at in range(0, len(examples), 2)]
    if padded:
        bins = padded_bins([max(both) for both in lengths], max(1, max_tokens // 2))
        return [_packed(examples, chosen) for chosen in bins]
    common = [common_prefix(examples[2 * pair].ids, examples[2 * pair + 1].ids) if shares else 0 for pair in range(len(lengths))]
    together = [pair for pair, shared in enumerate(common) if shared <= a_pass]
    bins = [[together[at] for at in chosen] for chosen in even_bins([sum(lengths[pair]) for pair in together], max_tokens)]
    prompts: dict[bytes, list[int]] = defaultdict(list)
    for pair, shared in enumerate(common):
        if shared > a_pass:
            prompts[examples[2 * pair].ids[:shared].tobytes()].append(pair)
    for pairs in prompts.values():
        shared = common[pairs[0]]
        own = [sum(lengths[pair]) - 2 * shared for pair in pairs]
        bins += [[pairs[at] for at in chosen] for chosen in even_bins(own, max(1, max_tokens - shared))]
    return [_packed(examples, chosen) for chosen in bins]


def _packed(examples: Sequence[Example], pairs: Sequence[int]) -> Batch:
    return pack_examples([examples[number] for pair in sorted(pairs) for number in (2 * pair, 2 * pair + 1)])

"""How much two texts have in common: character n-grams (chrF) and the longest common subsequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

LONGEST = 6  # characters of an n-gram
BETA = 2  # how much more recall counts than precision


def chrf(reply: str, reference: str) -> float:
    """chrF2 (Popović 2015) of one reply, from 0 to 1: F of precision and recall, each the mean over n-grams of 1 to 6 characters.

    White space does not count. Lengths of n-gram that one of the two texts is too short for are left out of the means.
    """
    left, right = "".join(reply.split()), "".join(reference.split())
    lengths = range(1, min(LONGEST, len(left), len(right)) + 1)
    if not lengths:
        return 0.0
    precision = recall = 0.0
    for length in lengths:
        written, wanted = _ngrams(left, length), _ngrams(right, length)
        common = sum((written & wanted).values())
        precision += common / written.total()
        recall += common / wanted.total()
    precision, recall = precision / len(lengths), recall / len(lengths)
    if not precision + recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def common_length(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence, a row of the table as one integer (Hyyrö 2004): O(len(left)) additions."""
    where: dict[Hashable, int] = {}
    for place, item in enumerate(right):
        where[item] = where.get(item, 0) | 1 << place
    every = (1 << len(right)) - 1
    row = every  # a zero bit is a place of `right` where the length grows by one
    for item in left:
        matched = row & where.get(item, 0)
        row = (row + matched | row - matched) & every
    return len(right) - row.bit_count()


def _ngrams(text: str, length: int) -> Counter[str]:
    return Counter(text[start : start + length] for start in range(len(text) - length + 1))

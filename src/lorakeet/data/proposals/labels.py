"""Labels that may be slips: of one row, or very like another label that has many more rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

_SHORTEST = 5  # letters of a label from which one changed letter is a slip, and not another word
_LONG = 8  # letters from which two are
_TIMES = 5  # as many rows has the label that is meant
_NAMED = 8  # labels of one row that are named


def label_notes(counts: Mapping[str, int]) -> list[str]:
    """Sentences on labels that are equal but for case, spaces or Unicode form, on likely slips, and on labels of one row.

    `counts` has the rows of each label, in all parts together.
    """
    like = slips(counts)
    notes = _alike(list(counts))
    notes += [
        f"{label!r} has {_rows(counts[label])} and is very like {other!r} ({counts[other]:,}): a typo? If so, mend the file."
        for label, other in like.items()
        if _folded(label) != _folded(other)
    ]
    if single := [label for label, count in counts.items() if count == 1 and label not in like]:
        more = f" and {len(single) - _NAMED:,} more" if len(single) > _NAMED else ""
        named = f"The label {single[0]!r} has" if len(single) == 1 else f"{_listed(single)}{more} have"
        notes.append(f"{named} 1 row{'' if len(single) == 1 else ' each'}: too few to train on and to measure.")
    return notes


def doubtful_labels(counts: Mapping[str, int]) -> set[str]:
    """The labels that a prompt should not propose: likely slips, and those of one row where others have more."""
    if max(counts.values(), default=0) <= 1:
        return set()
    return {*slips(counts), *(label for label, count in counts.items() if count == 1)}


def slips(counts: Mapping[str, int]) -> dict[str, str]:
    """Each label that may be a slip, with the one that is probably meant: one or two letters apart, with many more rows."""
    found = {}
    for label, count in counts.items():
        others = [other for other, more in counts.items() if other != label and more >= _TIMES * count and _near(label, other)]
        if others:
            found[label] = max(others, key=lambda other: counts[other])
    return found


def _near(label: str, other: str) -> bool:
    one, two = _folded(label), _folded(other)
    if one == two:
        return True
    shorter = min(len(one), len(two))
    most = 2 if shorter >= _LONG else 1 if shorter >= _SHORTEST else 0
    if not most or abs(len(one) - len(two)) > most or _digits(one) != _digits(two):  # "class 1" and "class 2" are two
        return False
    return _distance(one, two) <= most


def _folded(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _digits(label: str) -> str:
    return "".join(sign for sign in label if sign.isdigit())


def _distance(one: str, two: str) -> int:
    """The fewest letters to insert, leave out or replace (Levenshtein 1966), or neighbours to exchange."""
    before: list[int] = []
    row = list(range(len(two) + 1))
    for i, left in enumerate(one, start=1):
        older, before, row = before, row, [i]
        for j, right in enumerate(two, start=1):
            cheapest = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right))
            if i > 1 and j > 1 and left == two[j - 2] and one[i - 2] == right:
                cheapest = min(cheapest, older[j - 2] + 1)
            row.append(cheapest)
    return row[-1]


def _alike(labels: Sequence[str]) -> list[str]:
    """A sentence for each group of labels that differ in case, white space or Unicode form only."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(_folded(label), []).append(label)
    return [
        f"The labels {_listed(group)} differ in case, spaces or Unicode form only, but count as {len(group)}. If they are one, "
        "mend the file."
        for group in groups.values()
        if len(group) > 1
    ]


def _listed(labels: Sequence[str]) -> str:
    return " and ".join(map(repr, labels[:_NAMED]))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"

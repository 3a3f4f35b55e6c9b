"""Labels that may be slips: of a row or two, and but a letter, case, space or punctuation from one with many more rows."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from lorakeet.errors import Remedy
from lorakeet.settings import shown_default

_RARE = 2  # rows of a slip, at most
_TIMES = 5  # as many rows has the label that is meant
_SHORTEST, _LONGEST = 5, 40  # letters of a word in which one other letter is a slip
_LONG = range(8, 21)  # letters of a word in which two are
_MOST_WORDS = 40  # of a label that is compared word by word; more are a text
_NAMED = 8  # labels of one row that are named
_SHOWN = 4  # labels on a button
_MEANT = frozenset("#%&*@")  # punctuation that makes another label, as in C#
_PREFIXES = (
    "ab", "ad", "ante", "anti", "bi", "con", "contra", "de", "dis", "endo", "epi", "exo", "extra", "hyper", "hypo", "im", "in",
    "infra", "inter", "intra", "intro", "macro", "maxi", "micro", "mini", "mis", "mono", "non", "over", "para", "per", "peri",
    "poly", "post", "pre", "pro", "re", "retro", "sub", "super", "supra", "tri", "ultra", "un", "under", "uni",
)  # fmt: skip

Words = Mapping[str, tuple[str, ...]]  # of each label


def label_notes(counts: Mapping[str, int], renamed: Mapping[str, str] | None = None) -> list[str]:
    """Sentences on labels that are equal but for case, spaces or Unicode form, on likely slips, and on labels of one row.

    `counts` has the rows of each label, in all parts together; `renamed` is data.rename_labels, which they advise.
    """
    like = slips(counts)
    notes = []
    if groups := alike(counts):
        named = "; ".join(_listed(sorted([*names, meant])) for meant, names in [*groups.items()][:_NAMED])
        more = f"; and {len(groups) - _NAMED:,} more" if len(groups) > _NAMED else ""
        every = {name: meant for meant, names in groups.items() for name in names}
        notes.append(
            f"Labels that differ in case, spaces or Unicode form only count as several: {named}{more}. If they are one, mend the "
            f"file, or set {merging(every, renamed).flag}."
        )
    notes += [
        f"{label!r} has {_rows(counts[label])} and is very like {other!r} ({counts[other]:,}): a typo? If so, mend the file, or "
        f"set {merging({label: other}, renamed).flag}."
        for label, other in like.items()
        if _folded(label) != _folded(other)
    ]
    if single := [label for label, count in counts.items() if count == 1 and label not in like]:
        more = f" and {len(single) - _NAMED:,} more" if len(single) > _NAMED else ""
        named = f"The label {single[0]!r} has" if len(single) == 1 else f"{_listed(single)}{more} have"
        notes.append(f"{named} 1 row{'' if len(single) == 1 else ' each'}: too few to train on and to measure.")
    return notes


def merges(counts: Mapping[str, int], renamed: Mapping[str, str]) -> list[Remedy]:
    """What merges labels that are equal but for case, spaces or Unicode form, all together; then each likely slip by itself."""
    equal = {name: meant for meant, names in alike(counts).items() for name in names}
    single = [{label: meant} for label, meant in slips(counts).items() if label not in equal]
    return [merging(names, renamed) for names in ([equal] if equal else []) + single[:_NAMED]]


def merging(names: Mapping[str, str], renamed: Mapping[str, str] | None = None) -> Remedy:
    """The setting that reads each label as the one that it is mapped to, after those that are `renamed` already."""
    every = {**{label: names.get(meant, meant) for label, meant in (renamed or {}).items()}, **names}
    words = ", ".join(f"“{label:.40}” into “{meant:.40}”" for label, meant in [*names.items()][:_SHOWN])
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return Remedy("data.rename_labels", shown_default(every), f"Merge {words}{more}")


def doubtful_labels(counts: Mapping[str, int]) -> set[str]:
    """The labels that a prompt need not name: likely slips of one row, or in case, spaces or Unicode form. No others."""
    return {label for label, meant in slips(counts).items() if counts[label] == 1 or _folded(label) == _folded(meant)}


def slips(counts: Mapping[str, int]) -> dict[str, str]:
    """Each label that may be a slip, with the one that is probably meant, which has many more rows.

    They differ in case, spaces or punctuation, or in one word by a letter (two from 8 letters on). A word that begins with
    another letter or prefix, or has digits, is another word. The cost grows as the number of labels, not as that of pairs.
    """
    rare = [label for label, count in counts.items() if count <= _RARE]
    frequent = [label for label, count in counts.items() if count >= _TIMES]
    found: dict[str, str] = {}
    if not rare or not frequent:
        return found
    words = {label: _words(label) for label in (*rare, *frequent)}

    pairs = _equal_but_for_signs(rare, frequent, words)
    for ones, others in _one_word_apart(rare, frequent, words):
        pairs += [
            (label, other)
            for word, near in _near_words(list(ones), list(others))
            for label, other in product(ones[word], others[near])
        ]
    for label, other in pairs:
        if counts[other] >= _TIMES * counts[label] and (label not in found or counts[other] > counts[found[label]]):
            found[label] = other
    return {label: found[label] for label in rare if label in found}


def _equal_but_for_signs(rare: Sequence[str], frequent: Sequence[str], words: Words) -> list[tuple[str, str]]:
    same = defaultdict(list)
    for label in frequent:
        same[_joined(words[label])].append(label)
    return [(label, other) for label in rare for other in same.get(_joined(words[label]), ())]


def _one_word_apart(
    rare: Sequence[str], frequent: Sequence[str], words: Words
) -> Iterator[tuple[dict[str, list[str]], dict[str, list[str]]]]:
    """The rare and the frequent labels that have all words but one in common, each by that one word."""
    ones, others = _gaps(rare, words), _gaps(frequent, words)
    for key in ones:
        if key in others:
            yield ones[key], others[key]


def _gaps(labels: Sequence[str], words: Words) -> dict[tuple[int, tuple[str, ...]], dict[str, list[str]]]:
    """The labels by a word in them that may hold a slip, and these by its place and the other words."""
    found: dict[tuple[int, tuple[str, ...]], dict[str, list[str]]] = {}
    for label in labels:
        said = words[label] if len(words[label]) <= _MOST_WORDS else ()
        for place, word in enumerate(said):
            if _allowed(len(word), len(word)) and not any(map(str.isdigit, word)):
                found.setdefault((place, said[:place] + said[place + 1 :]), {}).setdefault(word, []).append(label)
    return found


def _near_words(ones: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of words of which one may be a slip of the other; only words that are equal without a letter or two are compared."""
    without = defaultdict(set)
    for other in others:
        for rest in _shortened(other):
            without[rest].add(other)
    for word in ones:
        for other in sorted({other for rest in _shortened(word) for other in without.get(rest, ())}):
            if word != other and _near(word, other):
                yield word, other


def _shortened(word: str) -> set[str]:
    """The word, and what is left of it without one letter, or without two where two may differ."""
    found = newest = {word}
    for _ in range(_allowed(len(word), len(word))):
        newest = {rest[:place] + rest[place + 1 :] for rest in newest for place in range(len(rest))}
        found = found | newest
    return found


def _allowed(length: int, other: int) -> int:
    """How many letters of two words of these lengths a slip may change."""
    shorter, longer = sorted((length, other))
    if shorter in _LONG and longer in _LONG:
        return 2
    return 1 if shorter >= _SHORTEST and longer <= _LONGEST else 0


def _near(word: str, other: str) -> bool:
    """True for a slip. A negation, as by in-, un- or a-, begins with another letter; hypo- and hyper- are prefixes."""
    if word[0] != other[0] or _prefixed(word, other):
        return False
    return edit_distance(word, other) <= _allowed(len(word), len(other))


def _prefixed(word: str, other: str) -> bool:
    """True if both words are one after a prefix each, or after a prefix and none."""
    stems, others = ({"", *(one for one in _PREFIXES if said.startswith(one))} for said in (word, other))
    return any(word[len(one) :] == other[len(two) :] for one in stems for two in others)


def _folded(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _words(label: str) -> tuple[str, ...]:
    """The label's words without case and punctuation; a sign between digits or at a word's end, as in 1.5 and A-, stays."""
    folded = _folded(label)
    around = zip(" " + folded, folded, folded[1:] + " ", strict=False)
    return tuple("".join(" " if _separates(*signs) else signs[1] for signs in around).split()) or (folded,)


def _separates(before: str, sign: str, after: str) -> bool:
    kind = unicodedata.category(sign)
    if not kind.startswith("P") or sign in _MEANT or (before.isdigit() and after.isdigit()):
        return False
    return kind != "Pd" or (before.isalnum() and after.isalnum())


def _joined(words: Sequence[str]) -> str:
    """The words as one, but for those with digits: "class 1 1" is not "class 11"."""
    return "".join(f" {word} " if any(map(str.isdigit, word)) else word for word in words)


def edit_distance(one: str, two: str) -> int:
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


def alike(counts: Mapping[str, int]) -> dict[str, list[str]]:
    """The labels that differ in case, white space or Unicode form only from one with as many rows or more, by that one."""
    groups: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda each: (-counts[each], each)):
        groups.setdefault(_folded(label), []).append(label)
    return {meant: sorted(others) for meant, *others in groups.values() if others}


def _listed(labels: Sequence[str]) -> str:
    return " and ".join(map(repr, labels[:_NAMED]))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"

"""Finds leaks: exact copies and near-duplicates within and across training, held-out and test rows.

Two texts are compared as sets of word triples (shingles), by their Jaccard similarity |X ∩ Y| / |X ∪ Y|. MinHash signatures
in an LSH index (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3) find candidates; each
candidate's similarity is then computed exactly, so a reported pair is never a false positive.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError

PARTS = ("test", "held-out", "training")  # a leaking row is dropped from the later part of this list
SHINGLE = 3
PERMUTATIONS = 128
RECALL = 0.999  # chance that LSH proposes a pair of exactly the threshold's similarity
_SHOWN = 5
_CACHED = 4096  # texts whose shingles are cached for comparisons
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class LeakPair:
    """Two rows with the same or nearly the same text: `row` may be dropped, `twin` stays."""

    row: Row
    row_part: str
    twin: Row
    twin_part: str
    similarity: float
    exact: bool

    def __str__(self) -> str:
        kind = "exact copy" if self.exact else f"similarity {self.similarity:.2f}"
        start = " ".join(self.row.text.split())[:70]
        return f"{self.row_part} {self.row.source} and {self.twin_part} {self.twin.source} ({kind}): '{start}…'"


@dataclass(frozen=True)
class LeakReport:
    """All duplicate pairs, and the rows that the policy dropped from training and held-out rows."""

    pairs: tuple[LeakPair, ...]
    policy: str
    dropped: tuple[Row, ...] = ()

    @property
    def across(self) -> tuple[LeakPair, ...]:
        """Pairs across training, held-out and test rows: the leaks."""
        return tuple(pair for pair in self.pairs if pair.row_part != pair.twin_part)

    @property
    def within(self) -> tuple[LeakPair, ...]:
        """Pairs within one part: no leak, but such rows count twice."""
        return tuple(pair for pair in self.pairs if pair.row_part == pair.twin_part)

    def lines(self) -> list[str]:
        """The report in sentences; names every leak."""
        lines = []
        if self.across:
            fate = f"{len(self.dropped)} dropped" if self.policy == "drop" else "kept, as data.on_leak says"
            rows = "1 row is" if len(self.across) == 1 else f"{len(self.across)} pairs of rows are"
            lines.append(f"{rows} on both sides of a split ({fate}):")
            lines.extend(f"  {pair}" for pair in self.across)
        for part in reversed(PARTS):
            twice = [pair for pair in self.within if pair.row_part == part]
            if twice:
                lines.append(f"{part} rows that repeat another one (kept): {len(twice)}, for example {twice[0]}")
        return lines or ["No duplicate rows found."]


@dataclass(frozen=True)
class CleanParts:
    """The rows after the leak policy, and the report."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    test: tuple[Row, ...]
    report: LeakReport


def check_leaks(train: Sequence[Row], held_out: Sequence[Row], test: Sequence[Row], spec: DataSpec) -> CleanParts:
    """Applies `spec.on_leak`: drops a leaking row from training (or from held-out, if its twin is a test row).

    Raises DataError if all held-out or test rows are training rows, if the policy is to refuse, or if no row is left.
    """
    for part, rows in (("held-out", held_out), ("test", test)):
        _refuse_equal(part, rows, train)
    _refuse_equal("test", test, held_out, among="held-out")
    pairs = find_duplicates({"test": test, "held-out": held_out, "training": train}, spec.near_duplicates)
    report = LeakReport(pairs, spec.on_leak)
    across = report.across
    if across and spec.on_leak == "refuse":
        more = f"\n  and {len(across) - _SHOWN} more" if len(across) > _SHOWN else ""
        shown = "".join(f"\n  {pair}" for pair in across[:_SHOWN])
        raise DataError(
            f"{len(across)} pairs of rows are on both sides of a split, and data.on_leak is 'refuse':{shown}{more}\n"
            "Remove one of each pair, or set --data.on_leak drop (from training) or keep."
        )
    if not across or spec.on_leak == "keep":
        return CleanParts(tuple(train), tuple(held_out), tuple(test), report)
    gone = {(pair.row_part, pair.row.key, pair.row.source) for pair in across}

    def left(part: str, rows: Sequence[Row]) -> tuple[Row, ...]:
        kept = tuple(row for row in rows if (part, row.key, row.source) not in gone)
        if rows and not kept:
            raise DataError(
                f"Every {part} row has a copy or near-copy among the rows that evaluate it ({across[0]}). "
                "Give other rows, or set --data.on_leak keep if equal prompts are intended."
            )
        return kept

    dropped = tuple(
        row for part, rows in (("held-out", held_out), ("training", train)) for row in rows if (part, row.key, row.source) in gone
    )
    return CleanParts(left("training", train), left("held-out", held_out), tuple(test), LeakReport(report.pairs, "drop", dropped))


def find_duplicates(parts: dict[str, Sequence[Row]], threshold: float) -> tuple[LeakPair, ...]:
    """Finds pairs of rows with equal or similar texts: at most one twin per row in each earlier part and in its own.

    `parts` are in the order of protection (PARTS). `threshold` 0 finds exact copies only.
    """
    documents = _documents(parts)
    pairs = [pair for document in documents for pair in _exact_pairs(document.members)]
    if threshold > 0:
        pairs.extend(_near_pairs(documents, threshold))
    order = {part: index for index, part in enumerate(parts)}
    return tuple(
        sorted(pairs, key=lambda pair: (-order[pair.row_part], order[pair.twin_part], -pair.similarity, pair.row.source))
    )


def normal_words(text: str) -> list[str]:
    """The words of a text, normalised (NFKC, case-folded), without punctuation and spacing."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(words: Sequence[str]) -> frozenset[str]:
    """The set of word triples of a text; a shorter text is a single shingle."""
    if len(words) <= SHINGLE:
        return frozenset((" ".join(words),))
    return frozenset(" ".join(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """|first ∩ second| / |first ∪ second|."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def lsh_bands(threshold: float) -> tuple[int, int]:
    """Bands b and rows r of the most selective LSH index that still finds similarity t: 1-(1-t^r)^b ≥ 0.999, b·r ≤ 128."""
    for rows in range(PERMUTATIONS // 2, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


@dataclass(frozen=True)
class _Document:
    """One text with all rows that have it, as (part, row)."""

    words: tuple[str, ...]
    members: tuple[tuple[str, Row], ...]


def _documents(parts: dict[str, Sequence[Row]]) -> list[_Document]:
    members: dict[tuple[str, ...], list[tuple[str, Row]]] = {}
    for part, rows in parts.items():
        for row in rows:
            # A text without words (punctuation only) is compared verbatim.
            members.setdefault(tuple(normal_words(row.text)) or (row.text.strip(),), []).append((part, row))
    return [_Document(words, tuple(rows)) for words, rows in members.items()]


def _exact_pairs(members: Sequence[tuple[str, Row]]) -> Iterator[LeakPair]:
    first: dict[str, Row] = {}
    for part, row in members:
        for twin_part, twin in first.items():
            yield LeakPair(row, part, twin, twin_part, similarity=1.0, exact=True)
        first.setdefault(part, row)


def _near_pairs(documents: Sequence[_Document], threshold: float) -> Iterator[LeakPair]:
    from datasketch import MinHash, MinHashLSH

    @functools.lru_cache(maxsize=_CACHED)  # shingles of all texts would take several times their memory
    def shingles_of(number: int) -> frozenset[str]:
        return shingles(documents[number].words)

    index, blank = MinHashLSH(num_perm=PERMUTATIONS, params=lsh_bands(threshold)), MinHash(num_perm=PERMUTATIONS, seed=1)
    sizes: list[int] = []
    for number, document in enumerate(documents):
        own, signature = shingles(document.words), blank.copy()
        signature.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in own])
        sizes.append(len(own))
        found: set[tuple[str, str]] = set()
        for other in sorted(index.query(signature)):
            small, large = sorted((sizes[number], sizes[other]))
            if small / large < threshold:  # the similarity cannot exceed small / large
                continue
            similarity = jaccard(own, shingles_of(other))
            if similarity >= threshold:
                yield from _first_twins(document, documents[other], similarity, found)
        index.insert(number, signature)


def _first_twins(document: _Document, other: _Document, similarity: float, found: set[tuple[str, str]]) -> Iterator[LeakPair]:
    """Pairs each row of `document` with one row per part of `other`, unless its part already has a twin there."""
    firsts: dict[str, Row] = {}
    for part, row in other.members:
        firsts.setdefault(part, row)
    done: set[tuple[str, str]] = set()
    for part, row in document.members:
        for twin_part, twin in firsts.items():
            if (part, twin_part) not in found:
                done.add((part, twin_part))
                yield _ordered(part, row, twin_part, twin, similarity)
    found |= done


def _ordered(part: str, row: Row, twin_part: str, twin: Row, similarity: float) -> LeakPair:
    if PARTS.index(part) < PARTS.index(twin_part):
        part, row, twin_part, twin = twin_part, twin, part, row
    return LeakPair(row, part, twin, twin_part, similarity=similarity, exact=False)


def _refuse_equal(part: str, rows: Sequence[Row], others: Sequence[Row], among: str = "training") -> None:
    keys = {row.key for row in others}
    if rows and all(row.key in keys for row in rows):
        raise DataError(
            f"All {len(rows)} {part} rows are {among} rows too ({rows[0].source} is the first); "
            f"they measure nothing. Give other {part} rows, or leave them out to split some off."
        )

"""Finds texts that are nearly equal: at most one word in five is changed, or one word of a short text.

Only words of a text's own count as changes: what many texts share weighs nothing, wherever it stands. A text may stand whole in
another, other text may stand around both, and passages may have changed places. Two texts with other numbers or signs are no
copies (`copies/words`).

Candidates share a rare sequence of three to five words, or are equal but for one word. Each candidate is then aligned word by
word. Two texts are near-copies if few words differ, and if what they share is too rare to be chance: words that many texts have
in common weigh nothing (`copies/rarity`). Other rows of a template differ in few words too. What gives them away is that
the changed words fit: they stand between the same neighbours in further texts. So a change that fits needs more shared bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lorakeet.data.copies.rarity import AT_ONCE, FEW, WINDOW, Hashes, NumberedTexts, find_rarity, mix, number_words
from lorakeet.data.copies.words import CHARACTER_LENGTH, calculates, is_character, other_values

CHANCE = 4.0  # bits that near-copies share at least, and log2 of the words where they may differ
FITTING = 3.0  # bits besides, and log2 of the texts, if the change fits: fewer than one such twin by chance in eight texts
WORDS_A_VALUE = 100  # own words for each number or sign that may differ in a long text
WHOLE = 10.0  # bits at most of a text that stands whole within another
LEAST = 2  # words that are not common, which near-copies share; one is enough where a common word differs
KEPT = 24  # sequences kept of each text
SHORT = 40  # words of a text that is also compared without each single word
_SHARED = 0.2  # of the sequences kept
_PAIRS = 2_000_000  # candidates at once, which bounds the memory
_BASE = np.uint64(0x9E3779B97F4A7C15)
_NEARLY_ONE = 0.8  # word that may differ counts as one
_TOO_LONG = 16_000  # words between the first and the last difference, of which no more are aligned
_COMMON_WORDS = 0.5  # of a candidate's words, by a hash of 64 bits
_LONGER = 3  # times as many own words as a text in which another stands whole: as much before and behind it
_MOVED = 3  # words of a passage that changed places
_OPERAND = 3  # words of added text that may continue a calculation: "x" and "x + 2 y"
_BETWEEN = 2  # words that weigh nothing, between own words, and are a text's own too

Matched = list[tuple[int, int]]


@dataclass(frozen=True)
class NearCopy:
    """Two texts, by number, the share of their words that they have in common, and the bits of these words."""

    first: int
    second: int
    similarity: float
    bits: float


def find_near_copies(texts: Iterable[Sequence[str]], threshold: float) -> list[NearCopy]:
    """All pairs of texts, given as words, whose similarity is at least `threshold` (above 0), or that differ in one word.

    One word may differ from `fewest_words` on.
    """
    numbered = number_words(texts)
    return _Search(numbered, threshold).run() if len(numbered) > 1 else []


def fewest_words(threshold: float) -> float:
    """Words of a text of which one may differ although this makes the similarity lower than `threshold`; four at 0.8."""
    return math.inf if threshold >= 1 else math.ceil(_NEARLY_ONE / (1 - threshold) - 1e-9)


class _Search:
    def __init__(self, texts: NumberedTexts, threshold: float) -> None:
        self.threshold = threshold
        self.numbered = texts
        self.lengths = [CHARACTER_LENGTH if is_character(word) else 1.0 for word in self.numbered.words]
        rarity = find_rarity(self.numbered)
        self.bits, self.around = rarity.bits, rarity.around
        self.features, self.kept = _features(self.numbered, rarity.sequences)
        self.total = np.add.reduceat(self.bits, self.numbered.starts[:-1])
        own = self.bits > 0
        self.own = _own_words(self.numbered, own)
        self.sketch = _sketches(self.numbered, own)
        self.words = np.sort(texts.owners().astype(np.int64) * len(texts.words) + texts.ids)

    def run(self) -> list[NearCopy]:
        found: dict[tuple[int, int], NearCopy] = {}
        for (keys, owners), least in (
            *((part, 0.0) for part in _patterns(self.numbered, self.bits > 0)),
            (self.features, _SHARED),
        ):
            for firsts, seconds in self._candidates(keys, owners, least):
                for first, second in zip(firsts.tolist(), seconds.tolist(), strict=True):
                    if (first, second) not in found and (copy := self._compare(first, second)) is not None:
                        found[first, second] = copy
        return [found[pair] for pair in sorted(found)]

    def _candidates(self, keys: Hashes, owners: NDArray[np.int32], least: float) -> Iterator[tuple[NDArray[np.int64], ...]]:
        for codes, counts in _pairs(keys, owners, len(self.numbered)):
            first, second = codes // len(self.numbered), codes % len(self.numbered)
            kept = counts >= least * np.minimum(self.kept[first], self.kept[second])
            kept &= np.minimum(self.total[first], self.total[second]) >= CHANCE
            kept &= np.minimum(self.own[first], self.own[second]) >= 1
            common = _bit_counts(self.sketch[first] & self.sketch[second])
            fewest = np.minimum(_bit_counts(self.sketch[first]), _bit_counts(self.sketch[second]))
            kept &= common >= _COMMON_WORDS * fewest
            own = self.own[first], self.own[second]
            kept &= np.maximum(*own) <= _LONGER * np.minimum(*own) + 1  # a word changed between common ones makes them own
            first, second = first[kept], second[kept]
            words = np.cumsum(self.numbered.starts[first + 1] - self.numbered.starts[first])
            words += np.cumsum(self.numbered.starts[second + 1] - self.numbered.starts[second])
            for part in np.split(np.arange(len(first)), np.flatnonzero(np.diff(words // AT_ONCE)) + 1):
                possible = part[self._may_be_copies(first[part], second[part])]
                yield first[possible], second[possible]

    def _may_be_copies(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
        """False where `_compare` finds no copy for certain: by the words alone, in any order, too few bits are shared."""
        (bits, missing), (other_bits, also_missing) = self._shared(first, second), self._shared(second, first)
        longest = np.maximum(self.own[first], self.own[second])
        allowed = np.maximum(1, ((1 - self.threshold) * longest + 1e-9).astype(np.int64))
        rearranged = np.maximum(missing, also_missing) > allowed
        fitting = FITTING + math.log2(len(self.numbered))
        needed = np.where(rearranged, np.where(np.minimum(missing, also_missing) == 0, min(WHOLE, fitting), fitting), CHANCE)
        return np.minimum(bits, other_bits) >= needed - 1e-6

    def _shared(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Of each first text: the bits of its words that the second has too, and how many own words the second lacks."""
        starts, count = self.numbered.starts, np.diff(self.numbered.starts)[first]
        pairs = np.repeat(np.arange(len(first)), count)
        places = np.arange(len(pairs)) + np.repeat(starts[first] - np.cumsum(count) + count, count)
        own = self.bits[places] > 0
        pairs, places = pairs[own], places[own]
        codes = second[pairs] * len(self.numbered.words) + self.numbered.ids[places]
        there = self.words[np.minimum(np.searchsorted(self.words, codes), len(self.words) - 1)] == codes
        bits = np.bincount(pairs[there], weights=self.bits[places[there]], minlength=len(first))
        return bits.astype(np.float64), np.bincount(pairs[~there], minlength=len(first)).astype(np.int64)

    def _compare(self, first: int, second: int) -> NearCopy | None:
        spans = one, other = self.numbered.span(first), self.numbered.span(second)
        texts = ids, others = [self.numbered.ids[span].tolist() for span in spans]
        bits, other_bits = weights = [self.bits[span].tolist() for span in spans]
        matched = align(ids, others)
        if not matched:
            return None
        gaps = _gaps(matched, (len(ids), len(others)))
        changed, whole = _changed(gaps, weights), _stands_whole(gaps)
        longest, allowed = self._allowed(texts, (first, second), 0)
        moved: Matched = []
        if rearranged := changed > allowed:  # text was added around the other, or passages were moved
            moved = _moved(texts, matched)
            core = [place for place, (i, j) in enumerate(matched) if min(bits[i], other_bits[j]) > 0]
            if not core:
                return None
            gaps = _without_moved(_gaps(matched[core[0] : core[-1] + 1], (len(ids), len(others))), moved)
            inner, added = _changed(gaps[1:-1], weights), 0
            for gap in (gaps[0], gaps[-1]):
                own = [_own(side, weight) for side, weight in zip(gap, weights, strict=True)]
                inner, added = inner + min(own), added + max(own) - min(own)
            if min(map(self._length, texts)) < fewest_words(self.threshold):
                return None
            longest, allowed = self._allowed(texts, (first, second), added)
            if (changed := inner) > allowed:
                return None
        if self._other_values((one, other), matched, moved) > int(self.own[[first, second]].min()) // WORDS_A_VALUE:
            return None
        values = [value for i, j in [*matched, *moved] if (value := min(bits[i], other_bits[j])) > 0]
        few = max(len(ids), len(others)) - len(matched) <= allowed
        least = LEAST - (few and self._changes_common_words(matched, bits, other_bits))
        needed = CHANCE + (math.log2(max(1, len(values))) if changed and not whole else 0.0)
        if len(values) >= least and sum(values) >= needed and (rearranged or self._fits(one, other, matched)):
            needed = min(needed + FITTING - CHANCE + math.log2(len(self.numbered)), WHOLE if whole else math.inf)
        if len(values) < least or sum(values) < needed:
            return None
        return NearCopy(first, second, 1 - changed / max(longest, changed + 1), sum(values))

    def _allowed(self, texts: Sequence[Sequence[int]], numbers: tuple[int, int], added: int) -> tuple[int, int]:
        """The own words of the longer text without those `added` around the other, and how many of them may differ."""
        longest = max(int(self.own[list(numbers)].max()) - added, int(self.own[list(numbers)].min()))
        allowed = int((1 - self.threshold) * longest + 1e-9)
        if allowed < 1 and max(map(self._length, texts)) >= fewest_words(self.threshold):
            allowed = 1
        return longest, allowed

    def _other_values(self, spans: tuple[slice, slice], matched: Matched, moved: Matched) -> int:
        """In how many places a number or sign differs. Of text around the other, only a sign beside that may count."""
        ends = spans[0].stop - spans[0].start, spans[1].stop - spans[1].start
        ids = [self.numbered.ids[span].tolist() for span in spans]
        before_each = [self.numbered.signs[span.start : span.stop + 1].tolist() for span in spans]  # and before the border
        gone, found = [{pair[side] for pair in moved} for side in range(2)], 0
        for before, behind in pairwise([(-1, -1), *matched, ends]):
            places = [[i for i in range(before[side] + 1, behind[side]) if i not in gone[side]] for side in range(2)]
            signs = [[before_each[side][i] for i in (*places[side], behind[side])] for side in range(2)]
            words = [[self.numbered.words[ids[side][i]] for i in places[side]] for side in range(2)]
            around = before == (-1, -1) or behind == ends
            if around and min(map(len, places)) >= _OPERAND:  # other text stands around the same
                continue
            if around and any(places) and not all(places):
                longer, beside = (0 if places[0] else 1), (0 if behind == ends else -1)
                sign, other = (signs[side][beside] for side in (longer, 1 - longer))
                operands = self.numbered.words[ids[longer][(before if behind == ends else behind)[longer]]], words[longer][beside]
                differ = sign != other and (
                    other > 0
                    or operands[0][0].isdigit()  # "-5 degrees" or "5 %", whatever was added
                    or (
                        len(places[longer]) <= _OPERAND
                        and self.bits[spans[longer]][places[longer]].any()
                        and calculates(self.numbered.sign_texts[sign])
                        and (any(before_each[1 - longer]) or any(len(word) == 1 or word.isdigit() for word in operands))
                    )
                )
            else:
                differ = [*filter(None, signs[0])] != [*filter(None, signs[1])] or (any(words) and other_values(*words))
            found += bool(differ)
        return found

    def _fits(self, one: slice, other: slice, matched: Sequence[tuple[int, int]]) -> bool:
        """True if further texts have the words around each change, as both texts have them."""
        ends = one.stop - one.start, other.stop - other.start
        for (i, j), (k, m) in pairwise([(-1, -1), *matched, ends]):
            for begin, last, to in ((one.start, i, k), (other.start, j, m)) if (k - i, m - j) != (1, 1) else ():
                if (self.around[begin + max(-1, last - WINDOW + 2) : begin + to] == 1).any():
                    return False
        return True

    def _changes_common_words(
        self, matched: Sequence[tuple[int, int]], bits: Sequence[float], other_bits: Sequence[float]
    ) -> bool:
        """True if a word that differs weighs nothing: a template's word changed, and what is in its slot did not."""
        sides = (bits, {i for i, _ in matched}), (other_bits, {j for _, j in matched})
        return any(value == 0 and place not in places for side, places in sides for place, value in enumerate(side))

    def _length(self, ids: Sequence[int]) -> float:
        """Words of a text; a character of a script without spaces is a part of one."""
        return sum(self.lengths[number] for number in ids)


Gap = tuple[list[int], list[int]]  # places of both texts between two words that match


def _gaps(matched: Matched, ends: tuple[int, int]) -> list[Gap]:
    """What stands before, between and behind the words that match."""
    bounds = [(-1, -1), *matched, ends]
    return [
        (list(range(i + 1, k)), list(range(j + 1, m)))
        for n, ((i, j), (k, m)) in enumerate(pairwise(bounds))
        if n in (0, len(matched)) or (k - i, m - j) != (1, 1)
    ]


def _stands_whole(gaps: Sequence[Gap]) -> bool:
    """Whether one text stands whole in the other, beside as many words as a passage has at least."""
    one, other = (sum(len(gap[side]) for gap in gaps) for side in range(2))
    return len(gaps) == 2 and min(one, other) == 0 and max(one, other) >= _MOVED


def _own(places: Sequence[int], bits: Sequence[float]) -> int:
    return sum(bits[place] > 0 for place in places)


def _changed(gaps: Sequence[Gap], weights: Sequence[Sequence[float]]) -> int:
    """Own words that differ: of each gap those of the side that has more."""
    return sum(max(_own(one, weights[0]), _own(other, weights[1])) for one, other in gaps)


def _moved(texts: Sequence[Sequence[int]], matched: Matched) -> Matched:
    """Words that match at another place, in runs of _MOVED and more."""
    places = [
        [i for i in range(len(text)) if i not in taken]
        for text, taken in zip(texts, map(set, zip(*matched, strict=True)), strict=True)
    ]
    left = [[text[i] for i in side] for text, side in zip(texts, places, strict=True)]
    again = [(places[0][i], places[1][j]) for i, j in align(*left)]
    runs: list[Matched] = []
    for i, j in again:
        if runs and runs[-1][-1] == (i - 1, j - 1):
            runs[-1].append((i, j))
        else:
            runs.append([(i, j)])
    return [pair for run in runs if len(run) >= _MOVED for pair in run]


def _without_moved(gaps: Sequence[Gap], moved: Matched) -> list[Gap]:
    one, other = {i for i, _ in moved}, {j for _, j in moved}
    return [([i for i in gap[0] if i not in one], [j for j in gap[1] if j not in other]) for gap in gaps]


def _own_words(texts: NumberedTexts, own: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Own words of each text, with the few words between two of them that weigh nothing."""
    places, owners = np.flatnonzero(own), texts.owners()
    count = np.bincount(owners[places], minlength=len(texts))
    between = np.diff(places) - 1
    inside = (between <= _BETWEEN) & (owners[places[1:]] == owners[places[:-1]])
    return count + np.bincount(owners[places[1:]][inside], weights=between[inside], minlength=len(texts)).astype(np.int64)


def align(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """The places (i, j) of a longest common subsequence: first[i] == second[j], both increasing.

    Bits of Python's integers are columns (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004).
    """
    begin = 0
    shorter = min(len(first), len(second))
    while begin < shorter and first[begin] == second[begin]:
        begin += 1
    end = 0
    while end < shorter - begin and first[-1 - end] == second[-1 - end]:
        end += 1
    parts = (text[begin : min(len(text) - end, begin + _TOO_LONG)] for text in (first, second))
    middle = _align_bits(*parts)
    head = [(i, i) for i in range(begin)]
    tail = [(len(first) - i, len(second) - i) for i in range(end, 0, -1)]
    return [*head, *((begin + i, begin + j) for i, j in middle), *tail]


def _align_bits(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    if not first or not second:
        return []
    places: dict[int, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    everything = (1 << len(first)) - 1
    row, rows = everything, [everything]
    for word in second:
        both = row & places.get(word, 0)
        row = ((row + both) | (row - both)) & everything
        rows.append(row)
    found: list[tuple[int, int]] = []
    i, j = len(first), len(second)
    while i and j:
        if rows[j] >> (i - 1) & 1:
            i -= 1
        elif not rows[j - 1] >> (i - 1) & 1:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found[::-1]


def _features(texts: NumberedTexts, sequences: Hashes) -> tuple[tuple[Hashes, NDArray[np.int32]], NDArray[np.int64]]:
    """The sequences by which texts find each other, with their texts; about KEPT of each, the same ones in similar texts."""
    places = np.flatnonzero(sequences)
    keys, owners = sequences[places], texts.owners()[places]
    each = np.bincount(owners, minlength=len(texts))
    share = np.minimum(1.0, KEPT / np.maximum(each, 1))
    kept = (mix(keys) >> np.uint64(11)).astype(np.float64) < share[owners] * 2.0**53
    return (keys[kept], owners[kept]), np.bincount(owners[kept], minlength=len(texts))


def _patterns(texts: NumberedTexts, own: NDArray[np.bool_]) -> Iterator[tuple[Hashes, NDArray[np.int32]]]:
    """Of each short text: itself, and itself without each single word or with a mark for it; with and without common words.

    The hashes are divided into parts of about AT_ONCE, so that equal ones are in one part.
    """
    lengths = np.diff(texts.starts) - 2
    parts = int(4 * lengths[lengths <= SHORT].sum()) // AT_ONCE + 2
    width = np.uint64(-(-(2**64) // parts))
    chosen = [(_by_length(texts, words), shortest) for words, shortest in ((texts.ids > 1, 4), (own, 1))]
    for part in range(parts):
        keys, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
        for by_length, shortest in chosen:
            for which, places in by_length:
                if places.shape[1] < shortest:
                    continue
                made = _variants(texts.hashes[texts.ids[places]]) ^ np.uint64(shortest)
                kept = made // width == part
                keys.append(made[kept])
                owners.append(np.repeat(which, kept.sum(axis=1)))
        order = np.argsort(np.concatenate(owners), kind="stable")
        yield np.concatenate(keys)[order], np.concatenate(owners)[order]


def _by_length(texts: NumberedTexts, words: NDArray[np.bool_]) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Of each length up to SHORT: the texts with so many of these words, and the words' positions (texts, length)."""
    places = np.flatnonzero(words)
    lengths = np.bincount(texts.owners()[places], minlength=len(texts))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    found = []
    for length in range(1, SHORT + 1):
        which = np.flatnonzero(lengths == length).astype(np.int32)
        if len(which):
            found.append((which, places[starts[which][:, None] + np.arange(length)]))
    return found


def _variants(words: Hashes) -> Hashes:
    """Hashes (texts, 2·words + 1) of sequences (texts, words): whole, each word replaced by a mark, each word left out."""
    count = words.shape[1]
    powers = np.cumprod(np.full(count, _BASE, np.uint64))
    terms = words * powers
    whole = terms.sum(axis=1, dtype=np.uint64, keepdims=True)
    replaced = whole - terms + powers * np.uint64(count)
    earlier = np.zeros_like(terms)
    earlier[:, 1:] = words[:, 1:] * powers[:-1]  # of words that move up by one place
    behind = np.cumsum(earlier[:, ::-1], axis=1, dtype=np.uint64)[:, ::-1] - earlier
    before = np.cumsum(terms, axis=1, dtype=np.uint64) - terms
    return mix(np.concatenate((whole, replaced, before + behind), axis=1))


def _pairs(keys: Hashes, owners: NDArray[np.int32], texts: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of texts that share a key, as first * texts + second, with how many they share; owners ascend."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    begins = np.concatenate(([0], np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1)) if len(keys) else np.zeros(0, int)
    sizes = np.diff(np.concatenate((begins, [len(keys)])))
    usable = np.repeat((sizes > 1) & (sizes <= FEW), sizes)
    behind = np.repeat(begins + sizes, sizes) - np.arange(len(keys)) - 1
    behind[~usable] = 0
    owner = owners[order].astype(np.int64)
    entries = np.argsort(owner, kind="stable")
    entries = entries[behind[entries] > 0]
    done = np.cumsum(behind[entries])
    changes = np.flatnonzero(np.diff(owner[entries])) + 1
    begin = 0
    while begin < len(entries):
        target = (done[begin - 1] if begin else 0) + _PAIRS
        place = np.searchsorted(changes, max(begin + 1, int(np.searchsorted(done, target))))
        end = int(changes[place]) if place < len(changes) else len(entries)
        chosen = entries[begin:end]
        count = behind[chosen]
        offsets = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        left, right = np.repeat(owner[chosen], count), owner[np.repeat(chosen, count) + 1 + offsets]
        codes, shared = np.unique((left * texts + right)[left != right], return_counts=True)
        yield codes, shared
        begin = end


def _sketches(texts: NumberedTexts, own: NDArray[np.bool_]) -> Hashes:
    """64 bits of each text: of each word that is not common, one bit is set."""
    bits = np.uint64(1) << (texts.hashes[texts.ids] >> np.uint64(58))
    bits[~own] = 0
    return np.bitwise_or.reduceat(bits, texts.starts[:-1])


def _bit_counts(values: Hashes) -> NDArray[np.int64]:
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)

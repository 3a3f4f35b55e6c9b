"""Measures how surprising each word of each text is, given the other texts: what many texts share weighs nothing.

A word weighs -log2 p bits. p is the largest of its share of the texts and its probability given the one to four words before it,
or one word up to three places before it, counted in texts. So every word of an instruction that many rows begin with is expected,
and weighs nothing; so is every word of a template around its slots. The pair that is compared is taken off each count, so that a
copy does not make its own words expected.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorakeet.data.copies.words import is_sign

LONGEST = 5  # words of the longest sequence that is counted
SKIPPED = (2, 3)  # places before a word, of which one word alone is its context
WINDOW = 3  # words among which a change fits or does not
SHORTEST = 3  # words of the shortest sequence by which texts find each other
FEW = 50  # texts that may have a sequence by which texts find each other
UNSEEN = 16  # texts assumed beside the given ones, so that two texts alone are no template
DISCOUNT = 8  # texts by which a context must be outnumbered before it predicts anything
HIGHEST = 10.0  # bits of one word
EXPECTED = 0.5  # bits below which a word weighs nothing
AT_ONCE = 2_000_000  # words that are sorted at once, which bounds the memory
_STEP = np.uint64(0x9E3779B97F4A7C15)
_BEGIN, _END = 0, 1  # numbers of the two borders of every text

Counts = NDArray[np.int32]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class NumberedTexts:
    """Texts as numbers of their words, each between two borders: text t is ids[starts[t] : starts[t + 1]]."""

    ids: NDArray[np.uint32]  # (positions,)
    starts: NDArray[np.int64]  # (texts + 1,)
    hashes: Hashes  # (words,): one of each word, the same in every run
    words: tuple[str, ...]
    signs: NDArray[np.uint32]  # (positions,): the number of the signs before each word, which are no words of the text; 0: none
    sign_texts: tuple[str, ...]  # by these numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def span(self, text: int) -> slice:
        """The positions of the words of a text, without its borders."""
        return slice(int(self.starts[text]) + 1, int(self.starts[text + 1]) - 1)

    def owners(self) -> NDArray[np.int32]:
        """The text of each position."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))


@dataclass(frozen=True, eq=False)
class Rarity:
    """Of each position: the bits of its word, the texts that have it before the same two words, and the hash of the rare
    sequence that begins there (0 if none does)."""

    bits: NDArray[np.float32]
    around: Counts
    sequences: Hashes


def number_words(texts: Iterable[Sequence[str]]) -> NumberedTexts:
    """Numbers the words of the texts."""
    numbers: dict[str, int] = {"": _BEGIN, " ": _END}
    sign_numbers: dict[str, int] = {"": 0}
    lengths: list[int] = []
    signs = array("I")

    def positions() -> Iterator[int]:
        for words in texts:
            before, begin = "", len(signs)
            signs.append(0)
            yield _BEGIN
            for word in words:
                if word not in numbers and is_sign(word):
                    before = f"{before} {word}"
                    continue
                signs.append(sign_numbers.setdefault(before, len(sign_numbers)))
                before = ""
                yield numbers.setdefault(word, len(numbers))
            signs.append(sign_numbers.setdefault(before, len(sign_numbers)))
            lengths.append(len(signs) - begin)
            yield _END

    ids = np.fromiter(positions(), np.uint32)
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    hashes = np.fromiter(map(_word_hash, numbers), np.uint64, len(numbers))
    return NumberedTexts(ids, starts, hashes, tuple(numbers), np.asarray(signs, np.uint32), tuple(sign_numbers))


def find_rarity(texts: NumberedTexts) -> Rarity:
    """Counts the sequences of one to five words of all texts.

    Needs about 80 bytes a word: positions are sorted two million at a time.
    """
    owners, left = texts.owners(), _left(texts)
    chance = np.zeros(len(texts.ids), np.float32)
    found, open_ = np.zeros(len(texts.ids), np.uint64), np.ones(len(texts.ids), bool)
    keys, before = texts.hashes[texts.ids], np.zeros(0, np.int32)
    single = around = before
    for length in range(1, LONGEST + 1):
        if length > 1:
            keys[: 1 - length] *= _STEP
            keys[: 1 - length] += texts.hashes[texts.ids[length - 1 :]]
        counts = _texts_with(keys, owners, left >= length)
        if length == 1:
            chance, single = (np.maximum(counts - 2, 0) + 1).astype(np.float32) / np.float32(len(texts) + UNSEEN), counts
        else:
            _expect(chance, counts, before, length - 1)
        if length == WINDOW:
            around = counts
        if length >= SHORTEST:
            decided = open_ & (counts <= FEW)
            open_ &= ~decided
            shared = decided & (counts > 1)
            found[shared] = mix(keys[shared])
        before = counts
    for places in SKIPPED:
        keys = texts.hashes[texts.ids]
        keys[:-places] *= _STEP
        keys[:-places] += texts.hashes[texts.ids[places:]] ^ np.uint64(places)
        _expect(chance, _texts_with(keys, owners, left > places), single, places)
    bits = np.clip(-np.log2(chance, out=chance), 0, HIGHEST)
    bits[(bits < EXPECTED) | (texts.ids <= _END)] = 0
    return Rarity(bits, around, found)


def _left(texts: NumberedTexts) -> NDArray[np.int8]:
    """Positions up to the end of the text, itself included; more than needed count as LONGEST."""
    left = np.full(len(texts.ids), LONGEST, np.int8)
    for places in range(LONGEST - 1, 0, -1):
        ends = texts.starts[1:] - places
        left[ends[ends >= texts.starts[:-1]]] = places
    return left


def mix(keys: Hashes) -> Hashes:
    """Scrambles the bits of each number, so that any part of them is a hash too."""
    keys = (keys ^ (keys >> np.uint64(31))) * np.uint64(0x7FB5D329728EA185)
    return keys ^ (keys >> np.uint64(29))


def _expect(chance: NDArray[np.float32], counts: Counts, contexts: Counts, places: int) -> None:
    """Raises the chance of each word to that given its context, which begins `places` before it."""
    common = np.maximum(counts - 2, 0).astype(np.float32)
    context = np.maximum(contexts - 2, 0).astype(np.float32) + DISCOUNT
    behind = chance[places:]
    np.maximum(behind, (common / context)[:-places], out=behind)


def _texts_with(keys: Hashes, owners: NDArray[np.int32], valid: NDArray[np.bool_]) -> Counts:
    """In how many texts the key of each position stands; 0 where it is not valid."""
    found = np.zeros(len(keys), np.int32)
    parts = len(keys) // AT_ONCE + 2
    width = np.uint64(-(-(2**64) // parts))
    for part in range(parts):
        chosen = np.flatnonzero(valid & (keys // width == part))
        if not len(chosen):
            continue
        order = chosen[np.argsort(keys[chosen], kind="stable")]
        key, owner = keys[order], owners[order]
        new_key = np.concatenate(([True], key[1:] != key[:-1]))
        new_text = new_key | np.concatenate(([True], owner[1:] != owner[:-1]))
        groups = np.cumsum(new_key) - 1
        found[order] = np.bincount(groups[new_text])[groups]
    return found


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")

"""TF-IDF of words and of characters: what texts are to the baselines without a language model.

The values are those of scikit-learn's TfidfVectorizer (sublinear counts, smooth idf, rows of length 1).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from lorakeet.evaluate.intervals import Floats

Split = Callable[[str], list[str]]  # a text's terms, each as often as it occurs
_WORD = re.compile(r"\b\w\w+\b")


def words_of(text: str) -> list[str]:
    """Words of two letters or more in lower case, and each two neighbours."""
    words = _WORD.findall(text.lower())
    return words + [f"{one} {other}" for one, other in pairwise(words)]


def characters_of(shortest: int, longest: int) -> Split:
    """Splits a text into the character n-grams within its words, whose ends are spaces; n from `shortest` to `longest`."""
    return partial(_characters, shortest, longest)


def _characters(shortest: int, longest: int, text: str) -> list[str]:
    found = []
    for word in text.lower().split():
        padded = f" {word} "
        for length in range(shortest, longest + 1):
            found += [padded[at : at + length] for at in range(max(1, len(padded) - length + 1))]
            if len(padded) <= length:
                break
    return found


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of the texts that they were fitted to, each with its place and its inverse document frequency."""

    split: Split
    places: dict[str, int]
    rarity: Floats  # (terms,)

    @classmethod
    def fitted(cls, texts: Sequence[str], split: Split, *, most: int, least: int = 1) -> tuple[Terms, Any] | None:
        """The terms that occur in `least` texts, of these the `most` frequent; and the texts' own vectors.

        None if no term occurs in so many texts.
        """
        places: dict[str, int] = {}
        found = _counts(texts, split, places, grow=True)
        texts_with = np.bincount(found.indices, minlength=len(places))
        kept = np.flatnonzero(texts_with >= least)
        if len(kept) > most:
            total = np.asarray(found.sum(axis=0)).ravel()
            kept = kept[np.argsort(-total[kept], kind="stable")[:most]]
        if not len(kept):
            return None
        names = list(places)
        order = sorted(kept.tolist(), key=names.__getitem__)
        rarity = np.log((len(texts) + 1) / (texts_with[order] + 1)) + 1
        terms = cls(split, {names[old]: new for new, old in enumerate(order)}, rarity)
        return terms, terms._weighed(found[:, order].tocsr())

    def transform(self, texts: Sequence[str]) -> Any:
        """Vectors of the texts, a sparse matrix (texts, terms) in fp64; zero for a text without a known term."""
        return self._weighed(_counts(texts, self.split, self.places, grow=False))

    def _weighed(self, counts: Any) -> Any:
        from scipy.sparse import diags_array

        counts.data = (np.log(counts.data) + 1) * self.rarity[counts.indices]
        lengths = np.sqrt(np.asarray(counts.power(2).sum(axis=1)).ravel())
        return (diags_array(1 / np.where(lengths > 0, lengths, 1.0)) @ counts).tocsr()


def _counts(texts: Sequence[str], split: Split, places: dict[str, int], *, grow: bool) -> Any:
    """How often each term is in each text; with `grow` an unknown term gets the next place, else it is left out."""
    from scipy.sparse import csr_array

    columns, values, ends = array("i"), array("i"), array("i", [0])
    for text in texts:
        for term, count in Counter(split(text)).items():
            place = places.setdefault(term, len(places)) if grow else places.get(term, -1)
            if place >= 0:
                columns.append(place)
                values.append(count)
        ends.append(len(columns))
    data = np.asarray(values, dtype=np.float64)
    return csr_array((data, np.asarray(columns), np.asarray(ends)), shape=(len(texts), len(places)))

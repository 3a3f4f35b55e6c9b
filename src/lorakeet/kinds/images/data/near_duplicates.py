"""Finds pictures of the same photo: re-encoded, scaled, cropped a little, brighter, paler or mirrored.

Candidate pairs are filtered before `match` compares them. A copy has the fine structure of its photo at 16×16 cells,
up to its tangents: small crops (tangent distance: Simard, LeCun, Denker 1993) and its own square, for clipped tones. With f, a
high-pass filtered picture of norm 1, and an orthonormal basis U of the other's tangents, |Uf|² is the explained share: one
matrix product for a block of pairs. Pictures of little detail are filtered by their plain difference. Pairs with matching
difference hashes are always compared, if enough bits are set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorakeet.errors import percent
from lorakeet.kinds.images.data.folder import HASH_SIDE, ImageRow
from lorakeet.kinds.images.data.match import (
    LEVELS,
    Bools,
    Floats,
    Places,
    Prints,
    chosen,
    compared,
    enough_detail,
    gaussian,
    level,
    read_prints,
)

ALIKE, EXPLAINED = 0.7, 0.75  # smallest correlation of fine structure, and smallest share explained by tangents
DIFFERENT = 5.0  # largest RMS difference, grey levels, of pictures of little detail
TELLING = 64  # fewest bits set in an informative hash
_SIDE = LEVELS[0]
_BLOCK, _BATCH = 1024, (1024, 256, 64)  # pictures filtered at once, and pairs compared at once at each level


@dataclass(frozen=True)
class Copy:
    """Pictures number `left` and `right` show the same photo; `apart` is the share of the variance that differs."""

    left: int
    right: int
    apart: float
    mirrored: bool

    @property
    def words(self) -> str:
        """The difference, in words."""
        share = f"{percent(self.apart)} of its contrast differs" if self.apart else "no pixel differs"
        return f"mirrored; {share}" if self.mirrored else share


@dataclass(frozen=True)
class DuplicatePairs:
    """Pairs (n, 2) of numbers of pictures that show the same photo; `keys` are the hashes of all pictures' pixels."""

    keys: tuple[str, ...]
    pairs: NDArray[np.int32]

    def groups(self, of: Sequence[int] | None = None) -> list[int]:
        """A group number for each picture, or for each picture numbered in `of`; a group is one picture and its copies.

        Copies of copies are not included: a chain of slightly different pictures is not one photo.
        """
        chosen = np.arange(len(self.keys)) if of is None else np.asarray(of, np.intp)
        number = np.full(len(self.keys), -1)
        number[chosen] = np.arange(len(chosen))
        pairs = number[self.pairs]
        pairs = pairs[(pairs >= 0).all(1)]
        both = np.concatenate([pairs, pairs[:, ::-1]])
        both = both[np.argsort(both[:, 0], kind="stable")]
        starts = np.searchsorted(both[:, 0], np.arange(len(chosen) + 1))
        most = sorted(range(len(chosen)), key=lambda place: (starts[place] - starts[place + 1], self.keys[chosen[place]]))
        group = np.full(len(chosen), -1)
        for name, first in enumerate(most):
            if group[first] < 0:
                near = both[starts[first] : starts[first + 1], 1]
                group[[first, *near[group[near] < 0]]] = name
        return [int(name) for name in group]


def duplicate_pairs(rows: Sequence[ImageRow], bits: int) -> DuplicatePairs:
    """Finds all pairs of `rows` that show the same photo."""
    found = [np.stack([left, right], 1) for left, right, _, _ in _found(rows, rows, bits)]
    pairs = np.concatenate(found) if found else np.empty((0, 2), np.int32)
    return DuplicatePairs(tuple(row.pixels_key for row in rows), pairs[pairs[:, 0] != pairs[:, 1]])


def duplicate_groups(rows: Sequence[ImageRow], bits: int) -> list[int]:
    """A group number for each picture; a group is one picture and its copies."""
    return duplicate_pairs(rows, bits).groups()


def copies(left: Sequence[ImageRow], right: Sequence[ImageRow], bits: int) -> Iterator[Copy]:
    """Yields the pairs of `left` and `right` that show the same photo; `bits` 0 finds equal pixels only.

    Of a plain and a mirrored match, only the nearer is given. If both lists are the same object, a pair may occur once.
    """
    for ones, others, apart, mirrored in _found(left, right, bits):
        for number, place, share, way in zip(ones.tolist(), others.tolist(), apart.tolist(), mirrored.tolist(), strict=True):
            yield Copy(number, place, share, way)


_Found = tuple[NDArray[np.int32], NDArray[np.int32], Floats, Bools]


def _found(left: Sequence[ImageRow], right: Sequence[ImageRow], bits: int) -> Iterator[_Found]:
    """Yields copies as arrays: left, right, apart, mirrored."""
    if not left or not right:
        return
    _, order = np.unique([row.pixels_key for row in (*left, *right)], return_inverse=True)
    mine, theirs = order[: len(left)], order[len(left) :]
    equal = _equal(mine, theirs)
    yield (*equal, np.zeros(len(equal[0]), np.float32), np.zeros(len(equal[0]), bool))
    if not bits:
        return
    ones = _Features(left, mine)
    others = ones if left is right else _Features(right, theirs)
    for start in range(0, len(left), _BLOCK):
        chunk = np.arange(start, min(start + _BLOCK, len(left)))
        for first in range(start if ones is others else 0, len(right), _BLOCK):
            block = np.arange(first, min(first + _BLOCK, len(right)))
            ways = [_compared(ones, others, _candidates(ones, others, chunk, block, bits, way), way) for way in (False, True)]
            yield _nearest(ways)


def _equal(mine: Places, theirs: Places) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The pairs of equal numbers, as indices of both lists."""
    order = np.argsort(theirs, kind="stable")
    low, high = (np.searchsorted(theirs[order], mine, side) for side in ("left", "right"))
    counts = high - low
    left = np.repeat(np.arange(len(mine)), counts)
    within = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
    return left.astype(np.int32), order[np.repeat(low, counts) + within].astype(np.int32)


class _Features:
    """Features for filtering pairs. `order` numbers all compared pictures by their pixels."""

    def __init__(self, rows: Sequence[ImageRow], order: Places) -> None:
        self.order = order
        self.thumbs = [row.thumb for row in rows]
        self.across = np.array([(row.width * row.height) ** 0.5 for row in rows], np.float32)  # pixels of a side
        self.small: Floats = np.empty((len(rows), _SIDE, _SIDE), np.float32)
        self.clipped = np.empty((len(rows), 2, _SIDE, _SIDE), np.float16)
        self.tone, self.cut = np.empty(len(rows), bool), np.empty(len(rows), bool)  # true if there is enough detail for it
        for start in range(0, len(rows), _BLOCK):
            prints = read_prints(self.thumbs[start : start + _BLOCK])
            coarsest = level(prints, _SIDE)
            self.small[start : start + _BLOCK] = coarsest.light - 128
            self.clipped[start : start + _BLOCK] = coarsest.clipped
            self.tone[start : start + _BLOCK], self.cut[start : start + _BLOCK] = enough_detail(prints.light)
        size = HASH_SIDE * HASH_SIDE // 8
        hashes = np.frombuffer(b"".join(row.difference_hash.to_bytes(size, "big") for row in rows), np.uint8)
        self.hashes = np.unpackbits(hashes.reshape(len(rows), size), axis=1)


def _candidates(
    ones: _Features, others: _Features, chunk: Places, block: Places, bits: int, mirrored: bool
) -> tuple[Places, Places]:
    """The candidate pairs of pictures `chunk` and `block`."""
    mine, theirs = ones.small[chunk][..., ::-1] if mirrored else ones.small[chunk], others.small[block]
    rich, rich_too = np.flatnonzero(ones.tone[chunk]), np.flatnonzero(others.tone[block])
    near = np.zeros((len(chunk), len(block)), bool)
    near[np.ix_(rich, rich_too)] = _same_structure(mine[rich], theirs[rich_too])
    for plain, other in ((~ones.tone[chunk], np.ones(len(block), bool)), (ones.tone[chunk], ~others.tone[block])):
        near[np.ix_(plain, other)] = _equal_levels(mine[plain], theirs[other])
    if not mirrored:
        near |= _hashes_match(ones.hashes[chunk], others.hashes[block], bits)
    near &= ones.order[chunk, None] != others.order[None, block]
    if ones is others:
        near &= chunk[:, None] < block
    left, right = np.nonzero(near)
    return chunk[left], block[right]


def _same_structure(mine: Floats, theirs: Floats) -> Bools:
    """(n, m): true if fine structure correlates, and the tangents of one explain the other."""
    one, other = _unit(_fine(mine)), _unit(_fine(theirs))
    near = one @ other.T > ALIKE
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    if len(rows):
        one, other = one[rows], other[columns]
        explained = np.maximum(_explained(one, _bases(theirs[columns])), _explained(other, _bases(mine[rows])).T)
        near[np.ix_(rows, columns)] &= explained > EXPLAINED
    return np.asarray(near)


def _explained(fine: Floats, bases: Floats) -> Floats:
    """(n, m): the share of each of `fine` (n, 256) in the span of each of `bases` (m, k, 256)."""
    along = fine @ bases.reshape(-1, fine.shape[1]).T
    return np.asarray((along.reshape(len(fine), *bases.shape[:2]) ** 2).sum(2))


def _bases(small: Floats) -> Floats:
    """(n, 6, 256): orthonormal bases of a high-pass filtered picture, its square and its derivatives by a crop at each end."""
    place = ((np.arange(_SIDE) + 0.5) / _SIDE).astype(np.float32)
    down, across = np.gradient(small, axis=(1, 2))
    ends = across * place, across * (1 - place), down * place[:, None], down * (1 - place[:, None])
    found = np.stack([_fine(np.asarray(each, np.float32)) for each in (small, small**2 / 128, *ends)], 1)
    found = found / np.maximum(np.linalg.norm(found, axis=2, keepdims=True), 1e-3)
    basis, _ = np.linalg.qr(found.transpose(0, 2, 1))
    return np.asarray(basis.transpose(0, 2, 1), np.float32)


def _equal_levels(mine: Floats, theirs: Floats) -> Bools:
    """(n, m): true if the RMS difference of the unchanged pictures is small."""
    one, other = mine.reshape(-1, _SIDE**2), theirs.reshape(-1, _SIDE**2)
    apart = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    return np.asarray(apart <= DIFFERENT**2 * one.shape[1])


def _hashes_match(mine: NDArray[np.uint8], theirs: NDArray[np.uint8], bits: int) -> Bools:
    """(n, m): true if informative hashes differ in at most `bits` bits."""
    one, other = mine.astype(np.float32), theirs.astype(np.float32)
    sums, other_sums = one.sum(1), other.sum(1)
    apart = sums[:, None] + other_sums - 2 * one @ other.T
    return np.asarray((apart <= bits) & (sums >= TELLING)[:, None] & (other_sums >= TELLING))


def _compared(ones: _Features, others: _Features, pairs: tuple[Places, Places], mirrored: bool) -> _Found:
    """The copies among `pairs`. Pixels alone decide which of two is registered onto the other."""
    left, right = pairs
    swapped = ones.order[left] > others.order[right]
    tone, cut = ones.tone[left] & others.tone[right], ones.cut[left] & others.cut[right]
    across = np.minimum(ones.across[left], others.across[right])
    warp, apart = np.zeros((len(left), 4), np.float32), np.zeros(len(left), np.float32)
    for side, batch in zip(LEVELS, _BATCH, strict=True):
        remaining = np.flatnonzero(apart < 1)
        for start in range(0, len(remaining), batch):
            these = remaining[start : start + batch]
            first, second = _prints(ones, others, left[these], right[these], side)
            swap = swapped[these]
            one, other = chosen(swap, second, first), chosen(swap, first, second)
            one = one.mirrored() if mirrored else one
            apart[these], warp[these] = compared(one, other, warp[these], tone[these], cut[these], across[these])
    same = apart < 1
    return left[same].astype(np.int32), right[same].astype(np.int32), apart[same], np.full(int(same.sum()), mirrored)


def _prints(ones: _Features, others: _Features, left: Places, right: Places, side: int) -> tuple[Prints, Prints]:
    """The features of the pictures `left` of ones and `right` of others at one level."""
    if side == _SIDE:
        nothing = np.zeros((len(left), 0), np.float32)
        sides = ((ones, left), (others, right))
        first, second = (Prints(each.small[of], nothing, each.clipped[of].astype(np.float32)) for each, of in sides)
        return first, second
    first, second = (read_prints([each.thumbs[place] for place in of]) for each, of in ((ones, left), (others, right)))
    return level(first, side), level(second, side)


def _nearest(ways: Sequence[_Found]) -> _Found:
    """Each pair once, plain or mirrored, whichever is nearer."""
    left, right, apart, mirrored = (np.concatenate(parts) for parts in zip(*ways, strict=True))
    order = np.lexsort((mirrored, apart, right, left))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(left[order]) != 0) | (np.diff(right[order]) != 0)
    order = order[first]
    return left[order], right[order], apart[order], mirrored[order]


def _fine(small: Floats) -> Floats:
    """High-pass filter, flattened to (n, 256)."""
    return np.asarray((small - _COARSE @ small @ _COARSE.T).reshape(-1, _SIDE**2), np.float32)


def _unit(vectors: Floats) -> Floats:
    """`vectors` (n, 256) scaled to norm 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-3), np.float32)


_COARSE = gaussian(_SIDE, 2.5)

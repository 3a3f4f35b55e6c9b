"""Which pictures show one photo: re-encoded, scaled, cut a little, brighter, mirrored. From 3 KB kept of each picture.

Two pictures are compared as 32×32 RGB, smoothed by the binomial 1-2-1. One is fitted by the other's gain and offset, and by its
tangents of shift and stretch (tangent distance: Simard, LeCun, Denker 1993), which is a small cut. What is left, Σ residual²
over Σ (a − mean a)², does not depend on contrast: two objects on one plain ground are far apart, however small they are. A match
of the difference hash says little there, since plain ground sets no bits; it only lets a pair differ more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakeet.data.images import THUMB_SIDE, ImageRow

ALIGNED = 0.005  # of a picture's variance that the other, shifted and stretched, may leave unexplained
HASHED = 0.01  # that it may leave as it lies, where the hashes match too
TELLING, TOLD = 64, 0.04  # and where so many bits of a hash are set, which says more than one of a plain ground
COARSE, FINE = 0.4, 0.25  # that may be left at 8×8 places, and at 32×32 as they lie; what is above is not compared further
SHIFT = 2.0  # places of 32: the largest shift or stretch that is a small cut
GAIN = 1.7  # the largest ratio of contrasts
BRIGHTNESS = 64.0  # grey levels between the means
_FLAT = 1.0  # grey levels: pictures of less contrast are compared by their colour
_SAME_COLOUR = 8.0
_CHUNK, _BLOCK = 256, 1024  # pictures compared at once

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Copy:
    """Pictures number `left` and `right` are one photo; `apart` is the share of the variance that differs."""

    left: int
    right: int
    apart: float
    mirrored: bool

    @property
    def words(self) -> str:
        """How they differ."""
        share = f"{self.apart:.1%} of its contrast differs" if self.apart else "not a pixel differs"
        return f"mirrored; {share}" if self.mirrored else share


def copies(left: Sequence[ImageRow], right: Sequence[ImageRow], bits: int) -> Iterator[Copy]:
    """The pairs of `left` and `right` that are one photo, the nearest way only; `bits` 0 finds equal pixels alone.

    Where both are one list, a pair may be named once instead of twice.
    """
    by_key: dict[str, list[int]] = {}
    for place, row in enumerate(right):
        by_key.setdefault(row.pixels_key, []).append(place)
    exact = {(number, place) for number, row in enumerate(left) for place in by_key.get(row.pixels_key, ())}
    yield from (Copy(*pair, 0.0, False) for pair in sorted(exact))
    if not bits or not left or not right:
        return
    ones = _Looks(left)
    others = ones if left is right else _Looks(right)
    for start in range(0, len(left), _CHUNK):
        best: dict[tuple[int, int], Copy] = {}
        for mirrored in (False, True):
            for found in _alike(ones, others, range(start, min(start + _CHUNK, len(left))), bits, mirrored):
                pair = found.left, found.right
                if pair not in exact and (pair not in best or found.apart < best[pair].apart):
                    best[pair] = found
        yield from best.values()


def alike_groups(rows: Sequence[ImageRow], bits: int) -> list[int]:
    """A group number for each picture; those of a group are copies of one among them.

    Not of each other's copies: a chain of pictures, each a little unlike the last, is not one photo.
    """
    near: dict[int, list[int]] = {}
    for copy in copies(rows, rows, bits):
        if copy.left != copy.right:
            near.setdefault(copy.left, []).append(copy.right)
            near.setdefault(copy.right, []).append(copy.left)
    group = [-1] * len(rows)
    order = sorted(range(len(rows)), key=lambda place: (-len(set(near.get(place, ()))), rows[place].pixels_key))
    for number, first in enumerate(order):
        if group[first] < 0:
            group[first] = number
            for other in near.get(first, ()):
                if group[other] < 0:
                    group[other] = number
    return group


class _Looks:
    """The fingerprints of pictures: (n, 32, 32, 3) as bytes, and (n, 192) with mean 0 and length 1."""

    def __init__(self, rows: Sequence[ImageRow]) -> None:
        side = THUMB_SIDE
        self.hashes = [row.looks for row in rows]
        self.thumbs = np.frombuffer(b"".join(row.thumb for row in rows), np.uint8).reshape(len(rows), side, side, 3)
        self.means = self.thumbs.reshape(len(rows), -1).mean(1, dtype=np.float64)
        self.contrasts = np.array([max(float(thumb.std()), 1e-3) for thumb in self.thumbs])
        self.colours = self.thumbs.reshape(len(rows), -1, 3).mean(1, dtype=np.float64)
        self.flat = self.contrasts < _FLAT

    def coarse(self, places: Sequence[int], *, mirrored: bool = False) -> Floats:
        """(n, 192) float32."""
        thumbs = self.thumbs[places]
        small = (thumbs[:, :, ::-1] if mirrored else thumbs).reshape(len(thumbs), 8, 4, 8, 4, 3).mean((2, 4), dtype=np.float32)
        flat = small.reshape(len(thumbs), -1)
        flat = flat - flat.mean(1, keepdims=True)
        return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3), np.float32)

    def smooth(self, places: Sequence[int], *, mirrored: bool = False) -> Floats:
        """(n, 32, 32, 3): smoothed, with mean 0 and length 1."""
        thumbs = self.thumbs[places]
        wide = (thumbs[:, :, ::-1] if mirrored else thumbs).astype(np.float32)
        wide = np.pad(wide, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
        wide = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
        wide = wide[:, :, :-2] + 2 * wide[:, :, 1:-1] + wide[:, :, 2:]
        wide -= wide.mean((1, 2, 3), keepdims=True)
        return np.asarray(wide / np.maximum(np.sqrt((wide**2).sum((1, 2, 3), keepdims=True)), 1e-3), np.float32)


def _alike(ones: _Looks, others: _Looks, places: range, bits: int, mirrored: bool) -> Iterator[Copy]:
    """The copies of the pictures `places` of `ones` among all of `others`."""
    mine, mine_smooth = ones.coarse(places, mirrored=mirrored), ones.smooth(places, mirrored=mirrored)
    first = places.start if ones is others else 0
    for start in range(first, len(others.thumbs), _BLOCK):
        theirs = range(start, min(start + _BLOCK, len(others.thumbs)))
        near = mine @ others.coarse(theirs).T > (1 - COARSE) ** 0.5
        near &= np.abs(_outer(np.subtract, np.log(ones.contrasts[places]), np.log(others.contrasts[theirs]))) < np.log(GAIN)
        near &= np.abs(_outer(np.subtract, ones.means[places], others.means[theirs])) <= BRIGHTNESS
        near[ones.flat[places], :] = near[:, others.flat[theirs]] = False
        hues = np.abs(ones.colours[places, None] - others.colours[None, theirs]).max(2)
        flat = _outer(np.logical_and, ones.flat[places], others.flat[theirs]) & (hues <= _SAME_COLOUR)
        yield from (Copy(places[left], theirs[right], 0.0, mirrored) for left, right in np.argwhere(flat).tolist())
        if not near.any():
            continue
        theirs_smooth = others.smooth(theirs)
        near &= mine_smooth.reshape(len(places), -1) @ theirs_smooth.reshape(len(theirs), -1).T > (1 - FINE) ** 0.5
        aligned, plain = _unexplained(theirs_smooth, mine_smooth, near.T)
        other_way, _ = _unexplained(mine_smooth, theirs_smooth, near)
        aligned = np.minimum(aligned.T, other_way)
        for left, right in np.argwhere(aligned <= ALIGNED).tolist():
            yield Copy(places[left], theirs[right], float(aligned[left, right]), mirrored)
        for left, right in np.argwhere((plain.T <= TOLD) & (aligned > ALIGNED)).tolist() if not mirrored else ():
            one, other, apart = ones.hashes[places[left]], others.hashes[theirs[right]], float(plain[right, left])
            telling = min(one.bit_count(), other.bit_count()) >= TELLING
            if (one ^ other).bit_count() <= bits and apart <= (TOLD if telling else HASHED):
                yield Copy(places[left], theirs[right], apart, mirrored)


def _unexplained(pictures: Floats, targets: Floats, asked: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """What each of `pictures` leaves of the variance of those `targets` that are `asked` (pictures, targets), 1 for others.

    Once shifted and stretched, and once as they lie.
    """
    found = np.ones((2, *asked.shape), np.float32)
    flat = targets.reshape(len(targets), -1)
    for number in np.flatnonzero(asked.any(1)).tolist():
        places = np.flatnonzero(asked[number])
        tangents = _tangents(pictures[number])
        gram = tangents @ tangents.T
        gram += np.float32(1e-6) * np.eye(len(gram), dtype=np.float32) * np.trace(gram)
        along = flat[places] @ tangents.T
        weights = np.linalg.solve(gram, along.T).T
        fits = (weights[:, 0] > 0) & (np.abs(weights[:, 1:]).max(1) <= SHIFT * weights[:, 0])
        found[0, number, places] = np.where(fits, 1 - (along * weights).sum(1), 1)
        found[1, number, places] = np.where(along[:, 0] > 0, 1 - along[:, 0] ** 2, 1)
    return found[0].clip(0), found[1].clip(0)


def _tangents(picture: Floats) -> Floats:
    """(5, 3072): the picture and its derivatives by shift and stretch across and down, each with mean 0."""
    down, across = np.gradient(picture, axis=(0, 1))
    place = ((np.arange(THUMB_SIDE) + 0.5) / THUMB_SIDE * 2 - 1).astype(np.float32)
    stretched = across * place[None, :, None], down * place[:, None, None]
    found = np.stack([picture, across, down, *stretched]).reshape(5, -1)
    return np.asarray(found - found.mean(1, keepdims=True), np.float32)


def _outer(function: np.ufunc, left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(function.outer(left, right))

"""Decides if two pictures show the same photo: registers one onto the other and measures the residual cell by cell.

_Registration is that of Lucas and Kanade (1981), with gain and offset (Baker, Gross and Matthews 2003, "20 years on", part 3).
Picture a and target b are smoothed; x runs from 0 to 1. The warp a(x + p₀·(1 − x) + p₁·x) crops the side by p₀ and p₁ at its
two ends, and likewise vertically. It is improved by the least squares of

    b ≈ g·a + o + Σ qₖ·tₖ        t: (1 − x)·∂a/∂x, x·∂a/∂x, (1 − y)·∂a/∂y, y·∂a/∂y        p ← p + q/g

on grids of 16, 32 and 64 cells. Copies then agree in fine detail everywhere; different pictures may agree in coarse structure.
With residual r = b − (g·a + o), high-pass filter H and ⟨⟩ the mean around a cell, a match needs:

    Σ (Hr)² ≤ DETAIL · Σ (Hb)²              fine detail agrees (a common sky is no evidence)
    √⟨r²⟩ ≤ REST + SLOPE · √⟨|∇|²⟩          in every cell: lossy coding leaves some levels, resampling a share of the slope
    |r| ≤ COLOUR + SLOPE · √⟨|∇|²⟩          likewise for Cb and Cr, with one further gain

In cells with clipped pixels, b may be anything between a, g·a + o and the clipped colour of that, since clipped channels kept
their value. If a is the clipped picture, a may be anything between b and the inverse of the tone applied to b.
With p < PIXELS pixels along a cell, coding errors average out less: REST grows by √(PIXELS / p). If the detail of a picture is
weak or in few cells, a crop, gain or offset could make a different picture fit: such pairs are compared unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakeet.kinds.images.data.folder import COLOUR_SIDE, LIGHT_SIDE

DETAIL = 0.05  # largest residual share of the variance of fine detail
CODING = 0.5  # mean squared grey levels that lossy coding always leaves
REST, SLOPE = 2.5, 0.2  # largest residual around a cell: grey levels, and share of the slope
PIXELS = 4.0  # along a cell; with fewer, a larger residual is allowed
COLOUR, COLOUR_SLOPE = 3.0, 0.35  # the same for Cb and Cr, whose cells are four times as wide; twice the levels if clipped
CUT = 0.05  # largest crop, share of a side at either end
GAIN, OFFSET, SATURATION = 1.7, 70.0, 2.0  # largest gain, and 1 over it; grey levels; largest gain of Cb and Cr
WEAK = 1.5  # grey levels of detail, below which pictures are compared unchanged
FEW, SOME = 60.0, 200.0  # cells with detail needed to fit a brightness, and a crop
PALER = 1.5  # factor by which clipping may make a colour paler or stronger
COARSELY = 2.0  # factor of the bounds above the finest level
LEVELS = (16, 32, 64)  # cells along a side
_TIMES = 2  # warp iterations at each level
_TOUCHED = 0.1  # weight of clipped cells around a cell from which it counts as clipped
_COLOURFUL = 4.0  # mean squared levels of Cb and Cr needed to fit a gain
_UNCLIPPED = 0.04  # smallest share of cells to fit; if fewer are unclipped, the least clipped are taken

Floats = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Places = NDArray[np.intp]
Arrays = TypeVar("Arrays", "Prints", "_Registration")


@dataclass(frozen=True)
class Prints:
    """The features of n pictures by which they are compared."""

    light: Floats  # (n, 64, 64): luminance
    colour: Floats  # (n, 2, 16, 16): Cb and Cr, 0 in a grey picture
    clipped: Floats  # (n, 2, 64, 64): 1 if a channel of the cell is clipped at its bright, or at its dark end

    def mirrored(self) -> Prints:
        """The features of the mirrored pictures."""
        return Prints(self.light[..., ::-1], self.colour[..., ::-1], self.clipped[..., ::-1])


def read_prints(thumbs: Sequence[bytes]) -> Prints:
    """Decodes thumbnails from `thumb_of`."""
    light, colour = LIGHT_SIDE**2, 2 * COLOUR_SIDE**2
    packed = np.frombuffer(b"".join(thumbs), np.uint8).reshape(len(thumbs), -1)
    clipped = np.unpackbits(packed[:, light + colour :], axis=1)
    return Prints(
        packed[:, :light].reshape(-1, LIGHT_SIDE, LIGHT_SIDE).astype(np.float32),
        packed[:, light : light + colour].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE).astype(np.float32) - 128,
        clipped.reshape(-1, 2, LIGHT_SIDE, LIGHT_SIDE).astype(np.float32),
    )


def enough_detail(light: Floats) -> tuple[Bools, Bools]:
    """(n,) each: true if a picture has enough detail, in enough cells, to fit a brightness, and a crop."""
    energy = _around(_fine(_around(light, _BINOMIAL[LIGHT_SIDE])) ** 2, _WINDOW[LIGHT_SIDE])
    total = _sum(energy)
    places = total**2 / np.maximum(_sum(energy, energy), 1e-6)  # effective number of cells with detail
    strong = total >= WEAK**2 * LIGHT_SIDE**2
    return np.asarray(strong & (places >= FEW)), np.asarray(strong & (places >= SOME))


def level(prints: Prints, side: int) -> Prints:
    """The smoothed pictures at `side`×`side` cells, with the share of clipped cells."""
    clipped = _reduced(prints.clipped, side)
    return Prints(_around(_reduced(prints.light, side), _BINOMIAL[side]), prints.colour, _around(clipped, _BINOMIAL[side]))


def compared(ones: Prints, others: Prints, warp: Floats, tone: Bools, cut: Bools, across: Floats) -> tuple[Floats, Floats]:
    """Compares pairs at one `level`: the unexplained share (n,) of the other's variance, 1 if the photos differ; and the warps.

    The warps (n, 4) start the next level. `tone` and `cut` (n,) say which pairs have enough detail for them, `across` (n,) how
    many pixels the smaller picture has along a side. Before the finest level the bounds are wider and colours are ignored.
    """
    side = ones.light.shape[-1]
    finest = side == LIGHT_SIDE
    found = _fitted(ones, others, warp, tone, cut)
    left, over, alike = found.left, found.over, np.ones(len(warp), bool)
    if finest:
        left, alike = _coloured(ones, others, found)
    coding = np.sqrt(np.maximum(PIXELS * side / np.maximum(across, 1), 1))
    fine, whole = _fine(left), _fine(found.target) * over
    wider = 1 if finest else COARSELY
    detail = _sum(fine, fine) <= wider**2 * (DETAIL * _sum(whole, whole) + CODING * side**2)
    around = np.sqrt(_around(left**2, _WINDOW[side]))
    slope = np.sqrt(np.minimum(_steepness(found.fitted, _WIDE[side]), _steepness(found.target, _WIDE[side])))
    same = alike & (detail | ~tone) & (around <= wider * (REST * coding[:, None, None] + SLOPE * slope)).all((1, 2))
    apart = _sum(left, left) / np.maximum(found.target.var((1, 2)) * over.sum((1, 2)), 1.0)
    return np.asarray(np.where(same, np.minimum(apart, 0.99), 1), np.float32), found.warp


@dataclass(frozen=True)
class _Registration:
    """Pictures fitted to their targets (n, side, side): the residual `left`, compared cells `over`, cells `free` by clipping.

    `fitted` is the picture after `tone` (n, 2, 1), its gain and offset.
    """

    target: Floats
    fitted: Floats
    left: Floats
    over: Bools
    free: Bools
    clipped: Bools  # true if anything is clipped, even without effect on the luminance
    tone: Floats
    warp: Floats  # (n, 4)
    tone_fitted: Bools  # (n,): True if another tone was tried


def _fitted(ones: Prints, others: Prints, warp: Floats, tone: Bools, cut: Bools) -> _Registration:
    """The better of the unchanged and the registered pictures, both in the best tone, as far as their detail allows."""
    target = others.light
    warp = np.where(cut[:, None], _registered(ones.light, target, warp), np.float32(0))
    fits = []
    for each in (np.zeros_like(warp), warp):
        seen, over = _warped(ones.light, each)
        clipped = np.maximum(_warped(ones.clipped, each[:, None])[0], others.clipped)
        left, fitted, free, gain = _least(seen, target, over, clipped)
        as_it_is = ~tone[:, None, None]
        left, fitted = np.where(as_it_is, (target - seen) * over, left), np.where(as_it_is, seen, fitted)
        gain, touched = np.where(as_it_is, np.array([[1], [0]], np.float32), gain), clipped.max(1) > _TOUCHED
        fits.append(_Registration(target, fitted, left, over, free & ~as_it_is, touched & ~as_it_is, gain, each, tone))
    share = [_sum(fit.left, fit.left) / fit.over.sum((1, 2)) for fit in fits]
    return chosen(share[1] < share[0], fits[1], fits[0])


def _registered(pictures: Floats, targets: Floats, warp: Floats) -> Floats:
    """(n, 4): the improved warp of each picture onto its target. Includes clipped cells, which often have all edges."""
    size = targets[0].size if len(targets) else 1
    aim = (targets - targets.mean((1, 2), keepdims=True)).reshape(-1, size, 1)
    pictures = pictures - pictures.mean((1, 2), keepdims=True)
    for _ in range(_TIMES):
        seen, over = _warped(pictures, warp)
        tangents = _tangents(seen)
        weighted = tangents * over.reshape(-1, 1, size)
        gram = (weighted @ tangents.transpose(0, 2, 1)).astype(np.float64)
        scale = np.einsum("nkk->nk", gram)
        gram += np.eye(6) * (1e-4 * scale + 1e-6 * scale.mean(1, keepdims=True) + 1e-9)[:, None]
        found = np.linalg.solve(gram, (weighted @ aim).astype(np.float64))[..., 0]
        warp = np.clip(warp + found[:, 2:] / np.maximum(found[:, :1], 1 / GAIN), -CUT, CUT).astype(np.float32)
    return warp


def _tangents(pictures: Floats) -> Floats:
    """(n, 6, side²): the picture, a constant, and the derivatives with respect to the four ends of the warp."""
    side = pictures.shape[-1]
    place = ((np.arange(side) + 0.5) / side).astype(np.float32)
    tall = place[:, None]
    across, down = pictures @ _SLOPE[side].T * side, _SLOPE[side] @ pictures * side
    found = np.stack(
        [pictures, np.ones_like(pictures), across - across * place, across * place, down - down * tall, down * tall], 1
    )
    return np.asarray(found.reshape(-1, 6, side * side), np.float32)


def _warped(pictures: Floats, warp: Floats) -> tuple[Floats, Bools]:
    """The warped pictures, by cubic convolution (Keys 1981), and the mask (n, side, side) of cells well within them.

    Pictures are (n, side, side) and warps (n, 4), or (n, k, side, side) and (n, 1, 4).
    """
    side = pictures.shape[-1]
    place = ((np.arange(side) + 0.5) / side).astype(np.float32)
    columns, rows = (warp[..., end, None] * (1 - place) + warp[..., end + 1, None] * place + place for end in (0, 2))
    edge = 1 / side  # half of the outermost cell is beyond the picture
    inside = [(np.minimum(each, place) > edge) & (np.maximum(each, place) < 1 - edge) for each in (rows, columns)]
    within = [each.reshape(-1, side) for each in inside]
    seen = _sampling(rows) @ pictures @ np.swapaxes(_sampling(columns), -1, -2)
    return np.asarray(seen, np.float32), within[0][:, :, None] & within[1][:, None, :]


def _sampling(positions: Floats) -> Floats:
    """(…, side, side): the weights of the cells at positions (…, side) from 0 to 1."""
    side = positions.shape[-1]
    at = np.clip(positions * side - 0.5, 0, side - 1)
    first = np.floor(at).astype(np.intp) - 1
    taps = [(first + tap, np.abs(at - first - tap)) for tap in range(4)]
    weights = [_cubic(distance) * ((tap >= 0) & (tap < side)) for tap, distance in taps]
    total = np.sum(weights, axis=0)
    found = np.zeros((*positions.shape, side), np.float32)
    for (tap, _), weight in zip(taps, weights, strict=True):
        cell = np.clip(tap, 0, side - 1)[..., None]
        np.put_along_axis(found, cell, np.take_along_axis(found, cell, -1) + (weight / total)[..., None], -1)
    return found


def _cubic(distance: Floats) -> Floats:
    """The kernel of cubic convolution, up to a distance of 2 cells."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return np.asarray(np.where(distance < 1, near, far), np.float32)


def _least(seen: Floats, target: Floats, over: Bools, clipped: Floats) -> tuple[Floats, Floats, Bools, Floats]:
    """The residual, the fitted pictures, the free cells and the tone (n, 2, 1) of the best of three fits.

    The tone is fitted to all cells without bright clipping, to those without any clipping, and to all.
    """
    bright, either = clipped[:, 0], clipped.max(1)
    found = []
    for share, weight in ((bright, _least_clipped(over, bright)), (either, _least_clipped(over, either)), (either, over)):
        free = share > _TOUCHED
        tone = _tone(seen, target, weight.astype(np.float32))
        fitted = tone[:, :1] * seen + tone[:, 1:]
        inside = np.clip(target, np.minimum(seen, fitted), np.maximum(seen, fitted))
        left = (target - np.where(free, inside, fitted)) * over
        found.append((_sum(left, left)[:, None, None], left, fitted, free, tone))
    best = found[0]
    for each in found[1:]:
        better = each[0] < best[0]
        best = tuple(np.where(better, one, other) for one, other in zip(each, best, strict=True))  # type: ignore[assignment]
    return best[1], best[2], best[3], best[4]


def _least_clipped(over: Bools, share: Floats) -> Bools:
    """The unclipped cells of `over`, or the least clipped ones if these are few."""
    side = over.shape[-1]
    ranked = np.where(over, share, 2).reshape(-1, side * side)
    place = round(_UNCLIPPED * side * side)
    bound = np.partition(ranked, place, axis=1)[:, place, None, None]
    return np.asarray(over & (share <= np.maximum(bound, _TOUCHED)))


def _tone(seen: Floats, target: Floats, weight: Floats) -> Floats:
    """(n, 2, 1): the gain and offset that fit the weighted cells best to the target."""
    count = np.maximum(_sum(weight), 1)
    mean, aim = _sum(seen, weight) / count, _sum(target, weight) / count
    one = np.asarray((seen - mean[:, None, None]) * weight, np.float32)
    variance = _sum(one, one)
    gain = np.where(variance > 4 * count, _sum(one, target) / np.maximum(variance, 1e-6), 1).clip(1 / GAIN, GAIN)
    offset = (aim - gain * mean).clip(-OFFSET, OFFSET)
    return np.asarray(np.stack([gain, offset], 1)[..., None], np.float32)


def chosen(which: Bools, one: Arrays, other: Arrays) -> Arrays:
    """Selects for each pair the arrays of `one` if `which` is true, else of `other`."""
    found = {}
    for part in fields(one):
        mine, theirs = getattr(one, part.name), getattr(other, part.name)
        found[part.name] = np.where(which.reshape(-1, *(1,) * (mine.ndim - 1)), mine, theirs)
    return type(one)(**found)


def _coloured(ones: Prints, others: Prints, found: _Registration) -> tuple[Floats, Bools]:
    """The luminance residual given clipped colours, and (n,) whether the colours agree up to one gain.

    The gain is 1 for pictures compared unchanged. The gain of the luminance is tried too: it applies to all channels of a photo
    made brighter or of more contrast, and the best fit says little if much is clipped.
    """
    smooth = _BINOMIAL[COLOUR_SIDE]
    seen, over = _warped(_around(ones.colour, smooth), found.warp[:, None])
    target, over = _around(others.colour, smooth), over[:, None]
    size = LIGHT_SIDE // COLOUR_SIDE
    free: Bools = np.asarray(found.clipped.reshape(len(seen), COLOUR_SIDE, size, COLOUR_SIDE, size).any((2, 4)))[:, None]
    weight = _weighed(over[:, 0], ~free[:, 0])[:, None]
    energy = _sum(seen, seen * weight)
    best = np.clip(_sum(seen, target * weight) / np.maximum(energy, 1e-6), 1 / SATURATION, SATURATION)
    best = np.where(found.tone_fitted & (energy > _COLOURFUL * weight.sum((1, 2, 3))), best, 1)
    gains: tuple[Reals, Reals] = best[:, None, None, None], found.tone[:, :1, :, None]
    (left, rest), (left_too, rest_too) = (_unclipped_left(found, seen, target, gain, free) for gain in gains)
    least, alike = np.minimum(rest, rest_too), np.zeros(len(best), bool)
    for gain, each in zip(gains, (rest, rest_too), strict=True):
        same = np.asarray(gain * seen, np.float32)
        slope = np.sqrt(np.minimum(_steepness(same, _NEAR), _steepness(target, _NEAR)))
        bound = COLOUR * (1 + free) + COLOUR_SLOPE * slope
        alike |= (np.where(free, least, each) * over <= bound).all((1, 2, 3))
    return np.where(np.abs(left) < np.abs(left_too), left, left_too), alike


def _unclipped_left(found: _Registration, seen: Floats, target: Floats, gain: Reals, free: Bools) -> tuple[Floats, Floats]:
    """The residuals of luminance (signed) and colour (absolute); in `free` cells, what clipping does not explain."""
    tone, offset = found.tone[:, :1], found.tone[:, 1:]
    plain, back = ((light - offset) / tone for light in (found.fitted, found.target))
    light, colour = _clipped(found.fitted, gain * seen)
    light_back, colour_back = _clipped(back, target / gain)
    onward = _outside(found.target, plain, found.fitted, light)
    onto = -tone * _outside(plain, found.target, back, light_back)
    either = np.where(np.abs(onward) < np.abs(onto), onward, onto) * found.over
    pale, strong = np.minimum(gain, 1) / PALER, np.maximum(gain, 1) * PALER
    forth = np.abs(_outside(target, pale * seen, strong * seen, colour))
    again = np.abs(_outside(seen, target / strong, target / pale, colour_back)) * gain
    rest = np.where(free, np.minimum(forth, again), np.abs(target - gain * seen))
    return np.asarray(np.where(found.free, either, found.left), np.float32), np.asarray(rest, np.float32)


def _outside(values: Reals, *bounds: Reals) -> Floats:
    """The distance of values from the range of the bounds."""
    return np.asarray(values - np.clip(values, np.minimum.reduce(bounds), np.maximum.reduce(bounds)), np.float32)


def _clipped(light: Reals, colour: Reals) -> tuple[Floats, Floats]:
    """Luminance (n, 64, 64), and Cb and Cr (n, 2, 16, 16), after clipping red, green and blue."""
    wide = _around(np.asarray(colour, np.float32), _WIDEN)
    channels = np.clip(light[:, None] + np.einsum("ck,nkyx->ncyx", _CHANNELS, wide), 0, 255)
    found = np.einsum("kc,ncyx->nkyx", _YCC, channels)
    return np.asarray(found[:, 0], np.float32), _reduced(np.asarray(found[:, 1:], np.float32), COLOUR_SIDE)


def _weighed(over: Bools, where: Bools) -> Floats:
    """1 for the cells to fit: those `over` both pictures that are unclipped (`where`), or all if these are few."""
    both = over & where
    few = both.sum((1, 2), keepdims=True) < _UNCLIPPED * over[0].size if len(over) else both
    return np.where(few, over, both).astype(np.float32)


def _reduced(pictures: Floats, side: int) -> Floats:
    """(…, side, side): the means of cells."""
    while pictures.shape[-1] > side:
        rows = pictures[..., ::2, :] + pictures[..., 1::2, :]
        pictures = np.asarray((rows[..., ::2] + rows[..., 1::2]) / 4, np.float32)
    return pictures


def _sum(pictures: Floats, others: Floats | None = None) -> Floats:
    """(n,): the sums of pictures, or of their products with others, over all cells."""
    flat = pictures.reshape(len(pictures), -1) if len(pictures) else np.zeros((0, 1), np.float32)
    if others is None:
        return np.asarray(flat.sum(1))
    return np.asarray(np.einsum("nk,nk->n", flat, others.reshape(flat.shape)))


def _fine(pictures: Floats) -> Floats:
    """High-pass filter."""
    return pictures - _around(pictures, _COARSE[pictures.shape[-1]])


def _steepness(pictures: Floats, window: Floats) -> Floats:
    """The squared gradient, averaged over `window`."""
    slope = _SLOPE[pictures.shape[-1]]
    return _around((slope @ pictures) ** 2 + (pictures @ slope.T) ** 2, window)


def _around(pictures: Floats, window: Floats) -> Floats:
    """The weighted means around every cell."""
    return np.asarray(window @ pictures @ window.T, np.float32)


def gaussian(side: int, width: float) -> Floats:
    """(side, side): Gaussian weights of `width` cells around each cell; rows sum to 1."""
    place = np.arange(side, dtype=np.float64)
    found = np.exp(-(((place[:, None] - place) / width) ** 2) / 2)
    return np.asarray(found / found.sum(1, keepdims=True), np.float32)


def _binomial(side: int) -> Floats:
    """(side, side): the 1-2-1 filter with repeated edges."""
    found = np.eye(side) / 2 + np.eye(side, k=1) / 4 + np.eye(side, k=-1) / 4
    found[0, 0] = found[-1, -1] = 0.75
    return found.astype(np.float32)


def _difference(side: int) -> Floats:
    """(side, side): central differences, one-sided at the ends."""
    found = (np.eye(side, k=1) - np.eye(side, k=-1)) / 2
    found[0, :2] = found[-1, -2:] = -1, 1
    return found.astype(np.float32)


_BINOMIAL = {side: _binomial(side) for side in LEVELS}
_SLOPE = {side: _difference(side) for side in LEVELS}
_COARSE, _WINDOW, _WIDE = ({side: gaussian(side, side * width / 64) for side in LEVELS} for width in (4, 1.5, 2.5))
_NEAR = gaussian(COLOUR_SIDE, 0.75)
_WIDEN = np.asarray(_BINOMIAL[LIGHT_SIDE] @ np.kron(np.eye(COLOUR_SIDE), np.ones((LIGHT_SIDE // COLOUR_SIDE, 1))), np.float32)
_CHANNELS = np.array([[0, 1.402], [-0.344136, -0.714136], [1.772, 0]], np.float32)  # contribution of Cb and Cr
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)

"""Whether two pictures show one photo: one is registered onto the other, and what is left is measured place by place.

Registration is that of Lucas and Kanade (1981), with gain and offset (Baker, Gross and Matthews 2003, "20 years on", part 3).
Of a picture a and a target b, both smoothed, with x from 0 to 1, the warp a(x + p₀·(1 − x) + p₁·x), which is a cut by p₀ and
p₁ of the side at its two ends, and likewise down, is improved by the least squares of

    b ≈ g·a + o + Σ qₖ·tₖ        t: (1 − x)·∂a/∂x, x·∂a/∂x, (1 − y)·∂a/∂y, y·∂a/∂y        p ← p + q/g

at 16, 32 and 64 places. Copies then agree in what is fine everywhere, while different pictures may agree in what is coarse. With
r = b − (g·a + o) three things are asked, H taking away what is coarse and ⟨⟩ the mean around a place:

    Σ (Hr)² ≤ DETAIL · Σ (Hb)²              a common sky says nothing
    √⟨r²⟩ ≤ REST + SLOPE · √⟨|∇|²⟩          at every place: coding leaves some levels, resampling some of the slope of both
    |r| ≤ COLOUR + SLOPE · √⟨|∇|²⟩          the same of Cb and Cr, whose gain is one number more

Where pixels of a place are clipped, b may be anything between a, g·a + o and what clipping makes of the colour of that, since
clipped channels kept their value; or, where the picture is the clipped one, a may be anything between b and what takes b to a.
Of p pixels to a side of a place, PIXELS / p > 1, coding is averaged less: REST grows by √(PIXELS / p). Where the detail of a
picture is weak or in few places, a cut, a gain or an offset would make another picture of it fit: such pairs are compared as
they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakeet.data.images.folder import COLOUR_SIDE, LIGHT_SIDE

DETAIL = 0.05  # the share of the detail's variance that may be left
CODED = 0.5  # squared grey levels, on the average, that coding leaves in any case
REST, SLOPE = 2.5, 0.2  # grey levels, and share of the change from place to place, that may be left around a place
PIXELS = 4.0  # along a place; where there are fewer, more levels may be left
COLOUR, COLOUR_SLOPE = 3.0, 0.35  # the same of Cb and Cr, whose places are four times as wide; twice the levels where clipped
CUT = 0.05  # of a side, at either end
GAIN, OFFSET, SATURATION = 1.7, 70.0, 2.0  # a gain may be so much or one by it; grey levels
WEAK = 1.5  # grey levels of detail, below which pictures are compared as they lie
FEW, SOME = 60.0, 200.0  # over how many places detail tells another brightness, and a cut
PALER = 1.5  # by how much a clipped channel may make a colour paler or stronger
COARSELY = 2.0  # by how much the bounds are wider above the finest level
LEVELS = (16, 32, 64)  # places along a side
_TIMES = 2  # how often the warp is improved at each of them
_TOUCHED = 0.1  # the weight of clipped places around a place from which it counts as clipped
_COLOURFUL = 4.0  # squared levels of Cb and Cr, on the average, that tell a gain
_UNCLIPPED = 0.04  # share of the places: where fewer are not clipped, so many of the least clipped are fitted

Floats = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Places = NDArray[np.intp]


@dataclass(frozen=True)
class Prints:
    """What is kept of pictures to compare them by."""

    light: Floats  # (n, 64, 64): luminance
    colour: Floats  # (n, 2, 16, 16): Cb and Cr, 0 in a grey picture
    clipped: Floats  # (n, 2, 64, 64): 1 where pixels of a place have a channel at its bright end, or at its dark one, else 0

    def of(self, places: Places) -> Prints:
        """Those of some of the pictures."""
        return Prints(self.light[places], self.colour[places], self.clipped[places])

    def mirrored(self) -> Prints:
        """Those of the mirrored pictures."""
        return Prints(self.light[..., ::-1], self.colour[..., ::-1], self.clipped[..., ::-1])


def read_prints(thumbs: Sequence[bytes]) -> Prints:
    """What `images.thumb_of` made of some pictures."""
    light, colour = LIGHT_SIDE**2, 2 * COLOUR_SIDE**2
    packed = np.frombuffer(b"".join(thumbs), np.uint8).reshape(len(thumbs), -1)
    clipped = np.unpackbits(packed[:, light + colour :], axis=1)
    return Prints(
        packed[:, :light].reshape(-1, LIGHT_SIDE, LIGHT_SIDE).astype(np.float32),
        packed[:, light : light + colour].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE).astype(np.float32) - 128,
        clipped.reshape(-1, 2, LIGHT_SIDE, LIGHT_SIDE).astype(np.float32),
    )


def enough_detail(light: Floats) -> tuple[Bools, Bools]:
    """(n,) each: whether the detail of pictures is enough, in places enough, to tell another brightness, and a cut."""
    energy = _around(_fine(_around(light, _BINOMIAL[LIGHT_SIDE])) ** 2, _WINDOW[LIGHT_SIDE])
    total = _sum(energy)
    places = total**2 / np.maximum(_sum(energy, energy), 1e-6)  # if all had as much: how many
    strong = total >= WEAK**2 * LIGHT_SIDE**2
    return np.asarray(strong & (places >= FEW)), np.asarray(strong & (places >= SOME))


def level(prints: Prints, side: int) -> Prints:
    """The smoothed pictures at `side` places, with the share of clipped places."""
    clipped = _reduced(prints.clipped, side)
    return Prints(_around(_reduced(prints.light, side), _BINOMIAL[side]), prints.colour, _around(clipped, _BINOMIAL[side]))


def compared(ones: Prints, others: Prints, warp: Floats, tone: Bools, cut: Bools, across: Floats) -> tuple[Floats, Floats]:
    """(n,): of pairs at one `level`, the share of the other's variance that the one leaves, 1 where they are not one photo.

    And the warps (n, 4) from which the next level starts. Which pairs are detailed enough for a `tone` and a `cut` is given,
    and how many pixels the smaller picture has `across`. Before the finest level the bounds
    are wider and colours are not compared.
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
    detail = _sum(fine, fine) <= wider**2 * (DETAIL * _sum(whole, whole) + CODED * side**2)
    around = np.sqrt(_around(left**2, _WINDOW[side]))
    slope = np.sqrt(np.minimum(_steepness(found.fitted, _WIDE[side]), _steepness(found.target, _WIDE[side])))
    same = alike & (detail | ~tone) & (around <= wider * (REST * coding[:, None, None] + SLOPE * slope)).all((1, 2))
    apart = _sum(left, left) / np.maximum(found.target.var((1, 2)) * over.sum((1, 2)), 1.0)
    return np.asarray(np.where(same, np.minimum(apart, 0.99), 1), np.float32), found.warp


@dataclass(frozen=True)
class _Registration:
    """Pictures fitted to their targets (n, side, side): what is `left`, `over` which places, where clipping leaves it `free`.

    `fitted` is the picture in another tone: tone (n, 2, 1) is its gain and its offset.
    """

    target: Floats
    fitted: Floats
    left: Floats
    over: Bools
    free: Bools
    clipped: Bools  # where anything is clipped, be it without effect on the luminance
    tone: Floats
    warp: Floats  # (n, 4)
    tone_fitted: Bools  # (n,): True if another tone was tried


def _fitted(ones: Prints, others: Prints, warp: Floats, tone: Bools, cut: Bools) -> _Registration:
    """The better of the pictures as they lie and registered, both in the best tone, as far as their detail allows either."""
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
    return _chosen(share[1] < share[0], fits[1], fits[0])


def _registered(pictures: Floats, targets: Floats, warp: Floats) -> Floats:
    """(n, 4): a better warp of each picture onto its target. Clipped places count too: often all edges are among them."""
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
    """(n, 6, side²): the picture, a constant, and the derivatives by the four ends of the warp."""
    side = pictures.shape[-1]
    place = ((np.arange(side) + 0.5) / side).astype(np.float32)
    tall = place[:, None]
    across, down = pictures @ _SLOPE[side].T * side, _SLOPE[side] @ pictures * side
    found = np.stack(
        [pictures, np.ones_like(pictures), across - across * place, across * place, down - down * tall, down * tall],
        1,
    )
    return np.asarray(found.reshape(-1, 6, side * side), np.float32)


def _warped(pictures: Floats, warp: Floats) -> tuple[Floats, Bools]:
    """The warped pictures, by cubic convolution (Keys 1981), and which places (n, side, side) lie well within them.

    Pictures are (n, side, side) and warps (n, 4), or (n, k, side, side) and (n, 1, 4).
    """
    side = pictures.shape[-1]
    place = ((np.arange(side) + 0.5) / side).astype(np.float32)
    columns, rows = (warp[..., end, None] * (1 - place) + warp[..., end + 1, None] * place + place for end in (0, 2))
    edge = 1 / side  # the outermost place is half of what is beyond
    inside = [(np.minimum(each, place) > edge) & (np.maximum(each, place) < 1 - edge) for each in (rows, columns)]
    within = [each.reshape(-1, side) for each in inside]
    seen = _sampling(rows) @ pictures @ np.swapaxes(_sampling(columns), -1, -2)
    return np.asarray(seen, np.float32), within[0][:, :, None] & within[1][:, None, :]


def _sampling(positions: Floats) -> Floats:
    """(…, side, side): the weights of the places at positions (…, side) from 0 to 1."""
    side = positions.shape[-1]
    at = np.clip(positions * side - 0.5, 0, side - 1)
    first = np.floor(at).astype(np.intp) - 1
    taps = [(first + tap, np.abs(at - first - tap)) for tap in range(4)]
    weights = [_cubic(distance) * ((tap >= 0) & (tap < side)) for tap, distance in taps]
    total = np.sum(weights, axis=0)
    found = np.zeros((*positions.shape, side), np.float32)
    for (tap, _), weight in zip(taps, weights, strict=True):
        held = np.clip(tap, 0, side - 1)[..., None]
        np.put_along_axis(found, held, np.take_along_axis(found, held, -1) + (weight / total)[..., None], -1)
    return found


def _cubic(distance: Floats) -> Floats:
    """The kernel of cubic convolution, up to 2 places away."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return np.asarray(np.where(distance < 1, near, far), np.float32)


def _least(seen: Floats, target: Floats, over: Bools, clipped: Floats) -> tuple[Floats, Floats, Bools, Floats]:
    """What is left of the targets, the fitted pictures, where they are free, and the tone (n, 2, 1), that which leaves least.

    Tried are: bright pixels are clipped, and the others tell the tone; bright and dark ones are; and all tell the tone.
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
    """The places of `over` where nothing is clipped, or, where these are few, the least clipped ones."""
    side = over.shape[-1]
    ranked = np.where(over, share, 2).reshape(-1, side * side)
    place = round(_UNCLIPPED * side * side)
    bound = np.partition(ranked, place, axis=1)[:, place, None, None]
    return np.asarray(over & (share <= np.maximum(bound, _TOUCHED)))


def _tone(seen: Floats, target: Floats, weight: Floats) -> Floats:
    """(n, 2, 1): the gain and offset that bring the places of `weight` nearest to the target."""
    count = np.maximum(_sum(weight), 1)
    mean, aim = _sum(seen, weight) / count, _sum(target, weight) / count
    one = np.asarray((seen - mean[:, None, None]) * weight, np.float32)
    variance = _sum(one, one)
    gain = np.where(variance > 4 * count, _sum(one, target) / np.maximum(variance, 1e-6), 1).clip(1 / GAIN, GAIN)
    offset = (aim - gain * mean).clip(-OFFSET, OFFSET)
    return np.asarray(np.stack([gain, offset], 1)[..., None], np.float32)


def _chosen(which: Bools, one: _Registration, other: _Registration) -> _Registration:
    """Of each pair `one` where `which` says so, else the `other`."""

    def of(mine: Any, theirs: Any) -> Any:
        return np.where(which.reshape(-1, *(1,) * (mine.ndim - 1)), mine, theirs)

    return _Registration(*(of(getattr(one, part.name), getattr(other, part.name)) for part in fields(_Registration)))


def _coloured(ones: Prints, others: Prints, found: _Registration) -> tuple[Floats, Bools]:
    """What is left of luminance once clipped colours are known, and (n,) whether the colours are the same but for one gain.

    It is 1 where the pictures are compared as they lie. Tried besides the best one is the gain of the luminance, which is that of
    all channels where a photo was made brighter or of more contrast: where much is clipped, the best one says little.
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
    """What is left of luminance (signed) and of colours (not), in `free` places what clipping explains neither way."""
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
    """By how much values lie outside of what the bounds enclose."""
    return np.asarray(values - np.clip(values, np.minimum.reduce(bounds), np.maximum.reduce(bounds)), np.float32)


def _clipped(light: Reals, colour: Reals) -> tuple[Floats, Floats]:
    """Luminance (n, 64, 64), and Cb and Cr (n, 2, 16, 16), after red, green and blue were clipped."""
    wide = _around(np.asarray(colour, np.float32), _WIDEN)
    channels = np.clip(light[:, None] + np.einsum("ck,nkyx->ncyx", _CHANNELS, wide), 0, 255)
    found = np.einsum("kc,ncyx->nkyx", _YCC, channels)
    return np.asarray(found[:, 0], np.float32), _reduced(np.asarray(found[:, 1:], np.float32), COLOUR_SIDE)


def _weighed(over: Bools, where: Bools) -> Floats:
    """1 for the places that are fitted: of those `over` both pictures the ones `where` nothing is clipped, if they are enough."""
    both = over & where
    few = both.sum((1, 2), keepdims=True) < _UNCLIPPED * over[0].size if len(over) else both
    return np.where(few, over, both).astype(np.float32)


def _reduced(pictures: Floats, side: int) -> Floats:
    """(…, side, side): the means of the places."""
    while pictures.shape[-1] > side:
        rows = pictures[..., ::2, :] + pictures[..., 1::2, :]
        pictures = np.asarray((rows[..., ::2] + rows[..., 1::2]) / 4, np.float32)
    return pictures


def _sum(pictures: Floats, others: Floats | None = None) -> Floats:
    """(n,): the sums of pictures, or of their products with others, over all places."""
    flat = pictures.reshape(len(pictures), -1) if len(pictures) else np.zeros((0, 1), np.float32)
    if others is None:
        return np.asarray(flat.sum(1))
    return np.asarray(np.einsum("nk,nk->n", flat, others.reshape(flat.shape)))


def _fine(pictures: Floats) -> Floats:
    """`pictures` without what is coarse."""
    return pictures - _around(pictures, _COARSE[pictures.shape[-1]])


def _steepness(pictures: Floats, window: Floats) -> Floats:
    """The squared change from place to place, meant over `window`."""
    slope = _SLOPE[pictures.shape[-1]]
    return _around((slope @ pictures) ** 2 + (pictures @ slope.T) ** 2, window)


def _around(pictures: Floats, window: Floats) -> Floats:
    """The weighted means around every place."""
    return np.asarray(window @ pictures @ window.T, np.float32)


def gaussian(side: int, width: float) -> Floats:
    """(side, side): for each place the weights of all, a bell of `width` places; they sum to 1."""
    place = np.arange(side, dtype=np.float64)
    found = np.exp(-(((place[:, None] - place) / width) ** 2) / 2)
    return np.asarray(found / found.sum(1, keepdims=True), np.float32)


def _binomial(side: int) -> Floats:
    """(side, side): 1-2-1, the outermost place counting for what is beyond."""
    found = np.eye(side) / 2 + np.eye(side, k=1) / 4 + np.eye(side, k=-1) / 4
    found[0, 0] = found[-1, -1] = 0.75
    return found.astype(np.float32)


def _difference(side: int) -> Floats:
    """(side, side): the central differences, one-sided at the ends."""
    found = (np.eye(side, k=1) - np.eye(side, k=-1)) / 2
    found[0, :2] = found[-1, -2:] = -1, 1
    return found.astype(np.float32)


_BINOMIAL = {side: _binomial(side) for side in LEVELS}
_SLOPE = {side: _difference(side) for side in LEVELS}
_COARSE, _WINDOW, _WIDE = ({side: gaussian(side, side * width / 64) for side in LEVELS} for width in (4, 1.5, 2.5))
_NEAR = gaussian(COLOUR_SIDE, 0.75)
_WIDEN = np.asarray(_BINOMIAL[LIGHT_SIDE] @ np.kron(np.eye(COLOUR_SIDE), np.ones((LIGHT_SIDE // COLOUR_SIDE, 1))), np.float32)
_CHANNELS = np.array([[0, 1.402], [-0.344136, -0.714136], [1.772, 0]], np.float32)  # of Cb and Cr, besides the luminance
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)

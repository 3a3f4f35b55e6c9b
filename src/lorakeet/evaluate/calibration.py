"""Calibration of a system's confidence: the expected calibration error and the reliability curve."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorakeet.evaluate.intervals import Estimate, Floats, Integers, or_words, proportion, resample_weights
from lorakeet.evaluate.spec import EvaluateSpec

_BISECTIONS = 30


class Binned:
    """Rows sorted by confidence and cut into bins of equal mass (Nixon et al. 2019, arXiv:1904.01685).

    Rows of equal confidence share a bin, so that a system with one constant confidence has one bin. Called with weights
    (draws, n) it returns the gaps (draws, bins): share of the bin · (accuracy - confidence).
    """

    def __init__(self, confidence: Floats, correct: NDArray[np.bool_], bins: int) -> None:
        self.order = np.argsort(confidence, kind="stable")
        self.confidence, self.correct, self.bins = confidence[self.order], correct[self.order], bins
        self.starts = np.flatnonzero(np.diff(self.confidence, prepend=-1.0) > 1e-12)

    def bin_of(self, mass: Floats) -> Integers:
        """The bin of each distinct confidence, by the middle of its range of cumulated mass (draws, distinct)."""
        middle = (np.cumsum(mass, axis=1) - mass / 2) / mass.sum(axis=1, keepdims=True)
        return np.asarray(np.minimum((middle * self.bins).astype(np.int64), self.bins - 1))

    def __call__(self, weights: Floats) -> Floats:
        ordered = weights[:, self.order]
        mass = np.add.reduceat(ordered, self.starts, axis=1)
        gaps = np.add.reduceat(ordered * (self.correct - self.confidence), self.starts, axis=1)
        cell = self.bin_of(mass) + self.bins * np.arange(len(weights))[:, None]
        summed = np.bincount(cell.ravel(), weights=gaps.ravel(), minlength=self.bins * len(weights))
        return np.asarray(summed.reshape(len(weights), self.bins) / mass.sum(axis=1, keepdims=True))


def calibration_error(
    confidence: Floats, correct: NDArray[np.bool_], *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None
) -> Estimate:
    """The expected calibration error Σ_bins |share · (accuracy - confidence)| with an interval by test inversion.

    Noise alone makes this sum positive, in the sample and again in every resample, so plain bootstrap intervals of a well
    calibrated system rarely reach down to the truth. In simulation at 95 %, 100 to 1000 rows, BCa and percentile intervals
    covered 0 %, basic ones 54 to 63 %; this one covered 91 to 100 %, for good and bad calibration.
    The gaps g are scaled, t·g, the bootstrap noise e of each draw is added, and the interval keeps every error t·Σ|g|
    under which the observed Σ|g| is plausible:

        low:  the smallest t with P(Σ|t·g + e| >= Σ|g|) >= (1 - confidence)/2;   high: the largest t with P(... <= ...) as much

    At t = 0 this is the test of perfect calibration by Bröcker and Smith (2007). The interval always contains the value.
    """
    n = len(confidence)
    binned = Binned(np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool), spec.calibration_bins)
    gaps = binned(np.ones((1, n)))[0]
    value = float(np.abs(gaps).sum())
    noise = np.concatenate([binned(weights) for weights in resample_weights(n, spec=spec, groups=groups)]) - gaps
    tail = (1 - spec.confidence) / 2

    def errors(scale: float) -> Floats:
        return np.asarray(np.abs(scale * gaps + noise).sum(axis=1))

    low = high = 1.0
    if value > 0:
        low = _edge(lambda scale: bool(np.mean(errors(scale) >= value) >= tail), outside=0.0, inside=1.0)
        high = _edge(lambda scale: bool(np.mean(errors(scale) <= value) >= tail), outside=1 / value, inside=1.0)
    over = "" if groups is None else f" over {len(set(groups))} groups"
    found = Estimate(value, low * value, high * value, n, "bootstrap test inversion" + over, spec.confidence, spec.seed)
    return or_words(found, groups)


def _edge(accepted: Callable[[float], bool], *, outside: float, inside: float) -> float:
    """Bisects for the scale between `inside` (accepted) and `outside` at which acceptance ends."""
    if accepted(outside):
        return outside
    for _ in range(_BISECTIONS):
        middle = (outside + inside) / 2
        outside, inside = (outside, middle) if accepted(middle) else (middle, inside)
    return inside


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of similar confidence: the mean probability they were given, and how often they were right."""

    confidence: float
    accuracy: Estimate


def reliability(confidence: Floats, correct: NDArray[np.bool_], *, spec: EvaluateSpec) -> tuple[ReliabilityBin, ...]:
    """The reliability curve: equal-mass bins in order of confidence, each accuracy with Wilson's interval."""
    binned = Binned(np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool), spec.calibration_bins)
    sizes = np.diff(np.append(binned.starts, len(confidence)))
    bins = np.repeat(binned.bin_of(sizes.astype(np.float64)[None])[0], sizes)
    return tuple(
        ReliabilityBin(
            float(binned.confidence[bins == number].mean()),
            proportion(int(binned.correct[bins == number].sum()), int(np.sum(bins == number)), confidence=spec.confidence),
        )
        for number in np.unique(bins)
    )

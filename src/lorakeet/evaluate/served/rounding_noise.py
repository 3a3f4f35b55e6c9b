"""Limits for what rounding may do, from computations of one function in one number format, each in another order.

A served adapter is compared with the live one in fp32. If it is the same function, its differences are one more draw of those
that the replicas have: the same weights in the same format, with sums in other orders. The limits are upper prediction bounds,
exceeded by a right server in at most `FALSE_ALARM` of certificates:

    mean KL           log-normal over replicas: exp(m + t·s·√(1 + 1/R)), t Student's quantile; s of both ways below, each about
                      its own mean, and as many degrees
    largest |Δ log p| peaks over a threshold: a generalised Pareto tail over the pooled differences, at 1 − α/N for N of them
                      (Pickands 1975; moments by Hosking and Wallis 1987), at least the largest that a replica has
    other tokens      binomial: the replicas' share, with one more counted, over the compared places; at least the bound of
                      Student's t over the replicas' shares. Answers by the binomial alone
    wrong scale       Student's t over what the replicas' differences look like as a scale that is off: |m| + t·s·√(1 + 1/R)

Pairs beside the weights and pairs folded into them may be two ways, with limits of their own: folding rounds a small change with
its weight, and may differ from fp32 ten times as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from lorakeet.evaluate.intervals import Floats

FALSE_ALARM = 1e-3  # of a certificate, split among its measures
MEASURES = 4
FEWEST = 4  # replicas
_LEAST_SPREAD = 0.15  # of log mean KL between replicas: they are few, and share the machine's kernels
_TWO_WAYS = 2.0  # times: alike by less, folded pairs and others are one sample
_TAIL = 0.05  # share of the differences that are the tail
_FEWEST = 20  # differences in the tail


@dataclass(frozen=True, eq=False)
class Replica:
    """One computation against fp32: KL of each place, |Δ log p| of each compared token, and what differs.

    `by_place` are its log-probabilities by token, by the ids that stand before a place.
    """

    kl: Floats  # (places,)
    differences: Floats  # (values,)
    other_tokens: int  # places whose likeliest token is another
    other_answers: int | None = None  # labelled rows with another label; None where no rows were answered
    by_place: Mapping[tuple[int, ...], Mapping[int, float]] = field(default_factory=dict)
    folded: bool = False  # whether pairs were folded into weights that are rounded


@dataclass(frozen=True)
class RoundingLimits:
    """The largest values that rounding explains, at FALSE_ALARM for all together."""

    mean_kl: float
    difference: float  # nats of one log-probability
    top1_agreement: float
    different_answers: float  # share of the labelled rows


def rounding_limits(
    replicas: Sequence[Replica], *, places: int, rows: int, others: Sequence[Replica] = ()
) -> RoundingLimits:
    """The limits for a server of which `places` places and `rows` labelled rows are compared; it computes as `replicas` do.

    Of `others`, which compute in another way, the spread of the mean KL counts too. Replicas whose numbers are not finite do not
    count. ValueError for fewer than FEWEST of `replicas`, and without places.
    """
    replicas, others = [one for one in replicas if _is_finite(one)], [one for one in others if _is_finite(one)]
    if len(replicas) < FEWEST or not places:
        raise ValueError(f"limits need {FEWEST} replicas and some places; given are {len(replicas)} and {places}")
    alpha = FALSE_ALARM / MEASURES
    changed = [one.other_tokens for one in replicas]
    share = _most(sum(changed), places * len(replicas), places, alpha) / max(places, 1)
    agreement = 1 - min(1.0, max(share, _share_bound([count / max(places, 1) for count in changed], alpha)))
    flips = [one.other_answers for one in replicas if one.other_answers is not None]
    answers = _most(sum(flips), rows * len(flips), rows, alpha) / max(rows, 1)
    pooled = np.concatenate([one.differences for one in replicas])
    return RoundingLimits(
        mean_kl=_mean_bound([float(one.kl.mean()) for one in replicas], [float(one.kl.mean()) for one in others], alpha),
        difference=_largest_bound(pooled, len(replicas[0].differences), alpha),
        top1_agreement=agreement,
        different_answers=answers,
    )


def scale_bound(scales: Sequence[float]) -> float:
    """How far one more scale may be from 1, where those of right computations are `scales`; infinite for fewer than FEWEST."""
    finite = np.array([one for one in scales if math.isfinite(one)])
    if len(finite) < FEWEST:
        return math.inf
    quantile = float(special.stdtrit(len(finite) - 1, 1 - FALSE_ALARM / MEASURES / 2))
    return abs(float(finite.mean()) - 1) + quantile * float(finite.std(ddof=1)) * math.sqrt(1 + 1 / len(finite))


def _share_bound(shares: Sequence[float], alpha: float) -> float:
    """The upper prediction bound of one more share, by the spread of these: places of a text are not independent."""
    count = len(shares)
    quantile = float(special.stdtrit(count - 1, 1 - alpha))
    return float(np.mean(shares)) + quantile * float(np.std(shares, ddof=1)) * math.sqrt(1 + 1 / count)


def two_ways(replicas: Sequence[Replica]) -> list[tuple[Sequence[Replica], Sequence[Replica]]]:
    """The replicas with pairs beside the weights, with the folded ones as others, and the other way round; all at once where
    one kind is not there, or their mean KL is less than _TWO_WAYS times apart."""
    beside, folded = ([one for one in replicas if one.folded == kind] for kind in (False, True))
    if not beside or not folded:
        return [(replicas, ())]
    apart = [float(np.median([one.kl.mean() for one in some])) for some in (beside, folded)]
    if max(apart) < _TWO_WAYS * min(apart):
        return [(replicas, ())]
    return [(beside, folded), (folded, beside)]


def _is_finite(one: Replica) -> bool:
    return bool(np.isfinite(one.kl).all() and np.isfinite(one.differences).all())


def _mean_bound(means: Sequence[float], others: Sequence[float], alpha: float) -> float:
    """The upper prediction bound of one more of `means`. A mean far below the others is no spread: it counts as their tenth."""
    parts = [np.log(np.maximum(some, max(1e-12, 0.1 * float(np.median(some))))) for some in (means, others) if len(some)]
    degrees = sum(map(len, parts)) - len(parts)
    spread = max(math.sqrt(sum(float(((one - one.mean()) ** 2).sum()) for one in parts) / degrees), _LEAST_SPREAD)
    quantile = float(special.stdtrit(degrees, 1 - alpha))
    return math.exp(float(parts[0].mean()) + quantile * spread * math.sqrt(1 + 1 / len(parts[0])))


def _largest_bound(pooled: Floats, values: int, alpha: float) -> float:
    """The bound of the largest of `values` further differences."""
    most = float(pooled.max(initial=0.0))
    tail = max(_FEWEST, int(_TAIL * len(pooled)))
    if len(pooled) <= 2 * tail or most == 0:
        return 4 * most
    ordered = np.sort(pooled)
    threshold, peaks = float(ordered[-tail - 1]), ordered[-tail:] - ordered[-tail - 1]
    mean, variance = float(peaks.mean()), float(peaks.var(ddof=1))
    shape = min(max(0.5 * (1 - mean**2 / variance), 0.0), 0.4) if variance > 0 else 0.0  # no shorter than exponential
    scale = mean * (1 - shape)
    odds = (tail / len(pooled)) * values / alpha  # how much rarer than a peak the bound is
    beyond = scale * math.log(odds) if shape == 0 else scale / shape * (odds**shape - 1)
    return max(threshold + beyond, most if variance > 0 else 2 * most)


def _most(found: int, tried: int, count: int, alpha: float) -> int:
    """The most of `count` further ones that differ, at the share found, with one more counted."""
    share = (found + 1) / (tried + 1)
    if share >= 1 or not count:
        return count
    numbers = np.arange(count + 1)
    return int(numbers[np.searchsorted(special.bdtr(numbers, count, share), 1 - alpha)]) if count else 0

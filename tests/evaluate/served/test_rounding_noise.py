"""Limits of what rounding does: a right server rarely exceeds them, a wrong one does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lorakeet.evaluate.served.rounding_noise import Replica, rounding_limits, scale_bound, two_ways

PLACES, TOKENS, ROWS = 300, 4, 16


def draw(chance: np.random.Generator, scales: np.ndarray, size: float = 1.0) -> Replica:
    """A computation whose log-probabilities are off by heavy-tailed noise: places differ in how much they amplify it."""
    noise = size * scales[:, None] * chance.standard_t(8, (PLACES, TOKENS))
    others, answers = int((np.abs(noise[:, 0]) > 0.15).sum()), int(chance.binomial(ROWS, 0.01))
    return Replica(0.5 * (noise**2).mean(1), np.abs(noise).ravel(), others, answers)


def exceeded(server: Replica, replicas: list[Replica]) -> bool:
    limits = rounding_limits(replicas, places=PLACES, rows=ROWS)
    return bool(
        server.kl.mean() > limits.mean_kl
        or server.differences.max() > limits.difference
        or 1 - server.other_tokens / PLACES < limits.top1_agreement
        or server.other_answers / ROWS > limits.different_answers
    )


def exceeding(trials: int, size: float) -> int:
    chance, found = np.random.default_rng(7), 0
    for _ in range(trials):
        scales = 0.01 * np.exp(chance.normal(0, 1, PLACES))
        found += exceeded(draw(chance, scales, size), [draw(chance, scales) for _ in range(8)])
    return found


def test_a_right_server_hardly_ever_exceeds_them() -> None:
    """At most 1 of 1,000 is promised; of 1,000 trials 5 or more would be as rare as 1 in 250."""
    assert exceeding(1000, 1.0) <= 4


def test_three_times_the_noise_is_seen() -> None:
    assert exceeding(60, 3.0) >= 57


def test_without_differences_the_limits_are_next_to_nothing() -> None:
    still = Replica(np.zeros(PLACES), np.zeros(PLACES), 0)
    limits = rounding_limits([still] * 4, places=PLACES, rows=0)
    assert limits.mean_kl < 1e-10 and limits.difference == 0 and limits.top1_agreement > 0.98 and limits.different_answers == 0


def test_too_few_replicas_have_no_spread() -> None:
    one, broken = Replica(np.ones(2), np.ones(2), 0), Replica(np.array([1.0, np.nan]), np.ones(2), 0)
    for replicas, places in (([one], 2), ([one] * 3 + [broken] * 5, 2), ([one] * 5, 0)):
        with pytest.raises(ValueError, match="limits need 4 replicas and some places"):
            rounding_limits(replicas, places=places, rows=0)


def test_one_replica_without_noise_does_not_make_the_limits_vast() -> None:
    """A replica that equals fp32 beside nine of one size says little of the spread."""
    noisy = [Replica(np.full(PLACES, 1e-5), np.full(PLACES, 0.01), 2, 1) for _ in range(9)]
    limits = rounding_limits([*noisy, Replica(np.zeros(PLACES), np.zeros(PLACES), 0)], places=PLACES, rows=ROWS)
    assert 1e-5 < limits.mean_kl < 1e-3 and limits.difference >= 0.01
    assert limits.different_answers == rounding_limits(noisy, places=PLACES, rows=ROWS).different_answers, "it answered no rows"


def test_folding_that_differs_ten_times_as_much_does_not_widen_the_limits_of_pairs_beside_the_weights() -> None:
    """SmolLM2 in bfloat16: means of 0.0014 beside, 0.015 folded; their common limit was 2.8 nats, of an adapter of 0.7."""
    chance = np.random.default_rng(3)

    def some(mean: float, count: int) -> list[Replica]:
        return [Replica(mean * np.exp(chance.normal(0, 0.1, 1)) * np.ones(PLACES), np.full(PLACES, 0.1), 2) for _ in range(count)]

    beside, folded = some(0.0014, 6), some(0.015, 4)
    folded = [replace(one, folded=True) for one in folded]
    ways = two_ways([*beside, *folded])
    assert ways == [(beside, folded), (folded, beside)] and two_ways(beside) == [(beside, ())]
    alike = [*beside, *(replace(one, folded=True) for one in some(0.0018, 4))]
    assert two_ways(alike) == [(alike, ())]
    limits = [rounding_limits(one, places=PLACES, rows=0, others=other).mean_kl for one, other in ways]
    assert 0.0014 < limits[0] < 0.005 and 0.015 < limits[1] < 0.05
    assert rounding_limits([*beside, *folded], places=PLACES, rows=0).mean_kl > 0.5


def test_one_more_scale_of_rounding_is_hardly_ever_beyond_the_bound_and_a_wrong_one_is() -> None:
    """At most 1 of 4,000 is promised: of 4,000 draws, 6 or more would be as rare as 1 in 1,700."""
    draws = 0.998 + 0.002 * np.random.default_rng(5).normal(size=(4000, 11))
    bounds = [scale_bound(list(one[:10])) for one in draws]
    assert sum(abs(one[10] - 1) > bound for one, bound in zip(draws, bounds, strict=True)) <= 5
    assert max(bounds) < 0.04 and np.median(bounds) < 0.02
    assert scale_bound([1.0, 1.0, 1.0]) == scale_bound([1.0] * 3 + [np.nan]) == np.inf and scale_bound([1.0] * 4) == 0

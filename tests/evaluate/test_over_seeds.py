"""`evaluate.over_seeds`: intervals that hold their level where seeds differ, where only rows do, and where both do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lorakeet.errors import DataError
from lorakeet.evaluate.compare import compare_losses
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.over_seeds import compare_over_seeds
from lorakeet.evaluate.spec import EvaluateSpec

SPEC = EvaluateSpec(resamples=100)


def runs(count: int, rows: int, *, seed_noise: float, generator: np.random.Generator, gain: float = 0.0) -> list[RowLosses]:
    """`count` seeds of one setting: each an offset of its own, and every row some noise beside what all of them share."""
    tokens = np.arange(rows) % 5 + 3
    shared = 2 + np.sin(np.arange(rows))
    return [
        RowLosses("run", tokens * (shared - gain + seed_noise * generator.normal() + 0.3 * generator.normal(size=rows)), tokens)
        for _ in range(count)
    ]


@pytest.mark.parametrize(("seed_noise", "seeds"), [(0.1, 3), (0.0, 3), (0.02, 5)])
def test_settings_that_do_not_differ_are_told_apart_in_one_case_of_twenty_at_most(seed_noise: float, seeds: int) -> None:
    """Over rows alone, seed noise of 0.1 nats is called a difference nearly always."""
    generator, claims = np.random.default_rng(0), 0
    for _ in range(200):
        left, right = (runs(seeds, 60, seed_noise=seed_noise, generator=generator) for _ in range(2))
        claims += compare_over_seeds(left, right, SPEC).verdict != "no difference shown"
    assert claims <= 16  # 5 % of 200, and two standard deviations of such a count


def test_a_gain_beyond_both_noises_is_shown_and_signed() -> None:
    generator = np.random.default_rng(1)
    good, bad = (runs(3, 60, seed_noise=0.02, generator=generator, gain=gain) for gain in (0.5, 0.0))
    found = compare_over_seeds(good, bad, SPEC)
    assert found.verdict == "better" and compare_over_seeds(bad, good, SPEC).verdict == "worse"
    assert found.difference.low < -0.5 < found.difference.high < 0 and found.difference.n == 60
    assert found.test == found.difference.method == "t over rows and 3 seeds" and found.p_value < 0.01


def test_one_seed_is_the_comparison_of_its_rows_and_many_equal_ones_nearly_so() -> None:
    generator = np.random.default_rng(2)
    left, right = (runs(1, 200, seed_noise=0.1, generator=generator) for _ in range(2))
    assert compare_over_seeds(left, right, SPEC) == compare_losses(left[0], right[0], SPEC)
    found, tokens = compare_over_seeds(left * 4, right * 4, SPEC), left[0].tokens
    gap = left[0].losses - right[0].losses
    value = gap.sum() / tokens.sum()
    reach = stats.t.ppf(0.975, 199) * np.std((gap - value * tokens) / tokens.mean(), ddof=1) / 200**0.5
    assert found.difference.value == pytest.approx(value) and found.difference.high == pytest.approx(value + reach)


def test_rows_of_a_group_count_as_one() -> None:
    generator = np.random.default_rng(3)
    left, right = (runs(3, 60, seed_noise=0.0, generator=generator) for _ in range(2))
    groups = tuple(range(60))
    twice = [
        [RowLosses("run", np.tile(one.losses, 2), np.tile(one.tokens, 2), groups * 2) for one in side] for side in (left, right)
    ]
    assert compare_over_seeds(*twice, SPEC).p_value == pytest.approx(compare_over_seeds(left, right, SPEC).p_value)


def test_sides_that_do_not_pair_are_refused() -> None:
    generator = np.random.default_rng(4)
    left, right = (runs(3, 20, seed_noise=0.0, generator=generator) for _ in range(2))
    with pytest.raises(DataError, match="3 seeds on one side and 2 on the other"):
        compare_over_seeds(left, right[:2], SPEC)
    with pytest.raises(DataError, match="same rows"):
        compare_over_seeds(left, [*right[:2], replace(right[2], tokens=right[2].tokens + 1)], SPEC)

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import optimize, stats

from lorakeet.evaluate.answers import Answers, measure
from lorakeet.evaluate.compare import compare_losses, compare_values
from lorakeet.evaluate.intervals import halves_of, limits, mean, ratio_with_test
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.paired import Paired, macro_f1_difference, score_difference
from lorakeet.evaluate.spec import EvaluateSpec

SPEC = EvaluateSpec(resamples=999)


def agree(difference, p_value: float) -> bool:  # type: ignore[no-untyped-def]
    return bool(difference.excludes_zero == (p_value < 1 - difference.confidence))


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_of_a_share_touches_zero_exactly_if_the_test_shows_nothing(confidence: float) -> None:
    shown = 0
    for n in (1, 2, 5, 6, 7, 12, 40, 379):
        for b, c in product(range(0, min(n, 30) + 1), repeat=2):
            if b + c <= n:
                found, p_value = score_difference(Paired(0, b, c, n - b - c), confidence)
                assert agree(found, p_value), (n, b, c)
                assert -1 <= found.low <= found.value <= found.high <= 1
                shown += found.excludes_zero
    assert shown > 200


def test_the_interval_of_a_mean_touches_zero_exactly_if_the_test_shows_nothing() -> None:
    """Over many paired samples of every shape: symmetric, skewed, with ties, with groups, of few rows."""
    generator, verdicts = np.random.default_rng(0), []
    for number in range(400):
        n = int(generator.integers(2, 60))
        shift = generator.choice([0.0, 0.3, 0.6])
        rows = [generator.normal(size=n), generator.exponential(size=n) - 1, generator.integers(-2, 3, n)][number % 3] + shift
        groups = tuple(int(row) // 3 for row in range(n)) if number % 4 == 0 else None
        tokens = generator.integers(1, 9, n)
        base = RowLosses("base", 20.0 + 0 * rows, tokens, groups)
        found = compare_losses(RowLosses("adapter", 20.0 + rows, tokens, groups), base, SPEC)
        assert agree(found.difference, found.p_value) and found.difference.excludes_zero == ("no" not in found.verdict)
        values = generator.choice([0.0, 0.5, 1.0], size=(2, n), p=[0.3, 0.4, 0.3])
        other = compare_values(("adapter", "base"), "token_f1", (values[0], values[1]), SPEC, groups=groups)
        assert agree(other.difference, other.p_value)
        verdicts.append(found.verdict)
    assert {"better", "worse", "no difference shown"} == set(verdicts)


def test_the_score_interval_solves_its_own_equation() -> None:
    """At each limit the likelihood-constrained statistic is the normal quantile; the constrained maximum is found numerically."""
    b, c, n, z = 14, 4, 60, stats.norm.ppf(0.975)
    found, p_value = score_difference(Paired(30, b, c, n - 30 - b - c), 0.95)
    assert p_value == pytest.approx(stats.binomtest(c, b + c).pvalue) and p_value > 2 * stats.norm.sf(10 / math.sqrt(18))
    for limit, sign in ((found.low, 1), (found.high, -1)):

        def against(q: float, limit: float = limit) -> float:  # −log likelihood of b, c where the shares differ by `limit`
            return -(b * math.log(q + limit) + c * math.log(q) + (n - b - c) * math.log(1 - 2 * q - limit))

        lowest = max(0.0, -limit) + 1e-9
        q = optimize.minimize_scalar(against, bounds=(lowest, (1 - limit) / 2 - 1e-9), options={"xatol": 1e-12}).x
        assert (b - c - n * limit) / math.sqrt(n * (2 * q + limit - limit**2)) == pytest.approx(sign * z, abs=1e-4)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_false_alarms_are_as_few_as_stated_whatever_share_of_rows_differs(confidence: float) -> None:
    """Of the rows that differ, either system wins each with the same chance: the coins of all samples are counted exactly."""
    for n, differ in [(40, differ) for differ in range(1, 41)] + [(2000, 4), (2000, 25)]:
        wins = np.arange(differ + 1)
        found = [score_difference(Paired(0, b, differ - b, n - differ), confidence) for b in range(differ + 1)]
        shown = np.array([one.excludes_zero for one, _ in found])
        assert stats.binom.pmf(wins, differ, 0.5)[shown].sum() <= 1 - confidence, differ
        assert all(p_value >= stats.binomtest(b, differ).pvalue - 1e-12 for b, (_, p_value) in enumerate(found))


def test_four_rows_that_differ_show_nothing_however_many_rows_there_are() -> None:
    for b, c in ((4, 0), (0, 4)):
        found, p_value = score_difference(Paired(500, b, c, 500 - b - c), 0.95)
        assert p_value == 0.125 and not found.excludes_zero
        assert 0.0 in (found.low, found.high) and "-0.0" not in (str(found.low), str(found.high))
    assert score_difference(Paired(500, 6, 0, 494), 0.95)[0].low > 0  # p = 0.03125


def test_typical_values_are_the_inverted_randomisation_test() -> None:
    """All 2^10 ways to exchange the systems, at values around each limit: kept within, rejected beyond."""
    rows = np.random.default_rng(3).normal(0.5, 1, 10)
    low, high, p_value = limits(*halves_of(rows, np.ones(10), EvaluateSpec(resamples=60_000)), 0.05)
    signs = np.array(list(product((-1, 1), repeat=10)))

    def exact(value: float) -> float:
        gaps = signs @ (rows - value)
        observed = float(np.sum(rows - value))
        return 2 * min(float(np.mean(gaps >= observed - 1e-12)), float(np.mean(gaps <= observed + 1e-12)))

    assert p_value == pytest.approx(exact(0.0), abs=0.01)
    reach = 0.1 * (high - low)
    assert exact(low - reach) < 0.05 < exact(low + reach)
    assert exact(high + reach) < 0.05 < exact(high - reach)
    whole, shown = ratio_with_test(rows, np.ones(10), spec=EvaluateSpec(resamples=60_000))
    assert whole.low <= low and whole.high >= high and shown >= p_value  # what bootstrap-t keeps is kept too


def test_few_rows_or_groups_have_words_for_an_interval() -> None:
    values = np.random.default_rng(0).normal(1, 0.1, 30)
    three = mean(values, spec=SPEC, groups=list(np.arange(30) % 3))
    assert three.why_none == "too few groups (3)" and not three.excludes_zero and "too few groups (3)" in str(three)
    assert ratio_with_test(values[:9], np.ones(9), spec=SPEC)[0].why_none == "too few rows (9)"
    assert ratio_with_test(values[:10], np.ones(10), spec=SPEC)[0].excludes_zero
    one_large = np.where(np.arange(64) == 7, 50.0, values.mean() + 0.01 * np.arange(64))
    assert mean(one_large, spec=SPEC).why_none == "rests on 1 of 64 rows"


def test_macro_f1_of_a_rare_label_says_so_and_has_no_difference() -> None:
    truth = np.array([0] * 57 + [1] * 3)
    logs = np.log(np.where(np.arange(2) == truth[:, None], 0.9, 0.1))
    sure = Answers("adapter", ("ok", "fraud"), truth, logs)
    blind = Answers("base", ("ok", "fraud"), truth, np.log([[0.9, 0.1]] * 60))
    assert measure(sure, SPEC)["macro_f1"].why_none == "too few rows of label 'fraud' (3)"
    found, p_value = macro_f1_difference(sure, blind, SPEC)
    assert not found.excludes_zero and p_value == 1


@pytest.mark.parametrize("n", [10, 30, 64])
def test_shares_are_covered_at_small_n_and_false_alarms_are_few(n: int) -> None:
    """The share of samples, weighed by their exact probability, whose interval has the true difference."""
    for gain, loss in ((0.05, 0.05), (0.1, 0.02), (0.3, 0.0), (0.3, 0.1), (0.25, 0.25)):
        covered, alarms = 0.0, 0.0
        for b in range(n + 1):
            for c in range(n - b + 1):
                weight = float(stats.multinomial.pmf([b, c, n - b - c], n, [gain, loss, 1 - gain - loss]))
                if weight < 1e-7:
                    continue
                found, _ = score_difference(Paired(0, b, c, n - b - c), 0.95)
                covered += weight * (found.low <= gain - loss <= found.high)
                alarms += weight * found.excludes_zero
        assert covered > 0.925, (gain, loss)
        assert gain != loss or alarms < 0.055

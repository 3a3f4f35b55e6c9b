from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lorakeet.errors import DataError
from lorakeet.evaluate.intervals import Estimate, bootstrap, mean, proportion, ratio, resample_weights, share, share_beyond
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.values import decode, encode

QUICK = EvaluateSpec(resamples=600)


def test_compact_text_and_json_round_trip() -> None:
    estimate = proportion(305, 379)
    assert str(estimate) == "0.805 [0.762, 0.842] n=379"
    assert decode(Estimate, encode(estimate)) == estimate


def test_wilson_is_its_formula_and_clopper_pearson_its_beta_quantiles() -> None:
    p, n, z = 12 / 40, 40, stats.norm.ppf(0.975)
    centre, reach = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    wilson = proportion(12, 40)
    assert wilson.low == pytest.approx((centre - reach) / (1 + z**2 / n))
    assert wilson.high == pytest.approx((centre + reach) / (1 + z**2 / n))
    exact = proportion(12, 40, method="clopper-pearson")
    assert exact.low == pytest.approx(stats.beta.ppf(0.025, 12, 29))
    assert exact.high == pytest.approx(stats.beta.ppf(0.975, 13, 28))
    assert proportion(0, 5).high > 0.3 and proportion(5, 5).low < 0.7


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_shares_agree_with_scipy_at_both_ends_and_between(confidence: float) -> None:
    for successes, n in ((0, 1), (1, 1), (0, 7), (7, 7), (1, 9), (305, 379), (99_999, 100_000)):
        test = stats.binomtest(successes, n)
        for method, formula in (("wilson", "wilson"), ("clopper-pearson", "exact")):
            found, there = proportion(successes, n, confidence=confidence, method=method), test.proportion_ci(confidence, formula)  # type: ignore[arg-type]
            assert (found.low, found.high) == pytest.approx((there.low, there.high), rel=1e-9), (successes, n, method)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_shares_are_refused(successes: int, n: int) -> None:
    with pytest.raises(DataError, match=f"{successes} of {n}"):
        proportion(successes, n)


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (8, 0.25), (64, 0.01)])
def test_the_share_beyond_a_count_is_scipy_s(n: int, rate: float) -> None:
    found = [share_beyond(k, n, rate) for k in range(n + 1)]
    assert found == pytest.approx([stats.binom.sf(k, n, rate) for k in range(n + 1)], abs=1e-12)


def test_bootstrap_of_a_skewed_mean_covers_95_percent() -> None:
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(400):
        values = generator.exponential(size=120)
        found = bootstrap(lambda w, v=values: (w @ v) / w.sum(axis=1), 120, spec=QUICK)  # type: ignore[misc]
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.91 < np.mean(covered) < 0.98


def test_groups_are_needed_and_enough_for_coverage() -> None:
    generator = np.random.default_rng(2)
    groups = list(np.repeat(np.arange(40), 8))
    with_groups, without = [], []
    for _ in range(300):
        values = np.repeat(generator.normal(size=40), 8) + 0.5 * generator.normal(size=320)
        grouped, plain = mean(values, spec=QUICK, groups=groups), mean(values, spec=QUICK)
        with_groups.append(grouped.low <= 0 <= grouped.high)
        without.append(plain.low <= 0 <= plain.high)
    assert 0.90 < np.mean(with_groups) < 0.98
    assert np.mean(without) < 0.7
    assert "over 40 groups" in grouped.method and grouped.n == 320


def test_bca_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).gamma(1.5, size=80)
    ours = bootstrap(lambda w: (w @ values) / w.sum(axis=1), 80, spec=EvaluateSpec(resamples=20_000))
    theirs = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(4)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_bca_corrects_a_biased_statistic_as_scipy_does() -> None:
    values = np.random.default_rng(7).gamma(1.5, size=30)

    def variance(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(axis=1)
        return (weights @ values**2) / total - ((weights @ values) / total) ** 2

    ours = bootstrap(variance, 30, spec=EvaluateSpec(resamples=40_000))
    theirs = stats.bootstrap(
        (values,), np.var, method="BCa", n_resamples=40_000, rng=np.random.default_rng(8)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, rel=0.03)
    assert ours.high == pytest.approx(theirs.high, rel=0.03)


def test_ratio_weighs_rows_by_their_denominator() -> None:
    assert ratio(np.array([2.0, 30.0]), np.array([1.0, 10.0]), spec=QUICK).value == pytest.approx(32 / 11)


def test_the_seed_fixes_the_interval_and_another_moves_it() -> None:
    values = np.random.default_rng(5).normal(size=50)
    assert mean(values, spec=QUICK) == mean(values, spec=QUICK)
    other = mean(values, spec=EvaluateSpec(resamples=600, seed=1))
    assert other.low != mean(values, spec=QUICK).low and other.seed == 1


def test_weights_are_counts_that_keep_groups_together() -> None:
    weights = np.concatenate(list(resample_weights(6, spec=QUICK, groups=["a", "a", "b", "b", "c", "c"])))
    assert weights.shape == (600, 6)
    assert np.array_equal(weights[:, 0], weights[:, 1]) and np.all(weights.sum(axis=1) == 6)


def test_a_constant_and_a_single_row_have_a_value() -> None:
    for values in (np.full(9, 2.0), np.array([3.0])):
        found = mean(values, spec=QUICK)
        assert found.value == values[0] and (found.low, found.high) == (-np.inf, np.inf) and "equal" in found.why_none


def test_many_rows_stay_in_bounded_memory() -> None:
    found = mean(np.random.default_rng(6).normal(size=30_000), spec=EvaluateSpec(resamples=200))
    assert found.low < 0.02 and found.high > -0.02 and found.high - found.low < 0.04


def test_share_uses_wilson_only_for_independent_rows() -> None:
    flags = np.array([True, False, True, True])
    assert share(flags, spec=QUICK).method == "Wilson"
    grouped = share(flags, spec=QUICK, groups=[0, 0, 1, 1])
    assert grouped.why_none == "too few groups (2)" and (grouped.low, grouped.high) == (0, 1)
    equal = share(np.ones(838, bool), spec=QUICK, groups=list(np.arange(838) % 6))
    assert equal.low == pytest.approx(0.541, abs=1e-3) and equal.method == "unseen share over 6 groups", "838 tokens of 6 texts"


def test_no_rows_and_too_few_group_ids_are_refused() -> None:
    with pytest.raises(DataError, match="0 rows"):
        mean(np.zeros(0), spec=QUICK)
    with pytest.raises(DataError, match="2 group ids for 3 rows"):
        mean(np.zeros(3), spec=QUICK, groups=[1, 2])

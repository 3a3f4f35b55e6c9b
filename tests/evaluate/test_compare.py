from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy import stats

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers, answers_from_probabilities
from lorakeet.evaluate.compare import (
    Comparison,
    compare_answers,
    compare_losses,
    compare_over_seeds,
    holm,
    pair,
    per_row,
    surviving_share,
)
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.spec import EvaluateSpec

QUICK = EvaluateSpec(resamples=600)


def answers(name: str, correct: np.ndarray, *, groups: tuple[int, ...] | None = None) -> Answers:
    """Two-label answers that are right where `correct`, all with the confidence 0.8; the truth alternates."""
    truth = np.arange(len(correct)) % 2
    said = np.where(correct, truth, 1 - truth)
    table = np.full((len(correct), 2), 0.2)
    table[np.arange(len(correct)), said] = 0.8
    return answers_from_probabilities(name, table, labels=("a", "b"), truth=truth, groups=groups)


def test_a_clear_gain_is_better_and_its_reverse_worse() -> None:
    generator = np.random.default_rng(0)
    left, right = answers("adapter", generator.random(300) < 0.85), answers("base", generator.random(300) < 0.6)
    gains, losses = compare_answers(left, right, QUICK), compare_answers(right, left, QUICK)
    assert [item.metric for item in gains] == ["accuracy", "macro_f1", "log_loss"]
    assert [item.verdict for item in gains] == ["better"] * 3
    assert [item.verdict for item in losses] == ["worse"] * 3
    paired = gains[0].paired
    assert paired == pair(left, right) and paired is not None and paired.n == 300
    assert gains[0].difference.value == pytest.approx((paired.only_left - paired.only_right) / 300)
    discordant = paired.only_left + paired.only_right
    assert gains[0].test == "McNemar"
    normal = stats.chi2.sf((paired.only_left - paired.only_right) ** 2 / discordant, 1)
    exact = stats.binomtest(paired.only_left, discordant).pvalue
    assert gains[0].p_value == pytest.approx(max(normal, exact), rel=1e-9)
    assert gains[2].difference.value < 0


def test_few_rows_show_no_difference_even_if_all_agree() -> None:
    found = compare_answers(answers("adapter", np.ones(4, dtype=bool)), answers("base", np.zeros(4, dtype=bool)), QUICK)
    assert {item.verdict for item in found} == {"no difference shown"}
    assert found[0].difference.low < found[0].difference.high


def test_false_alarms_stay_below_five_percent() -> None:
    generator = np.random.default_rng(4)
    spec = EvaluateSpec(resamples=300)
    alarms = np.zeros(3)
    for _ in range(150):
        shared = generator.random(120)
        pairs = [answers(name, shared + 0.3 * generator.normal(size=120) < 0.7) for name in ("adapter", "base")]
        alarms += [item.verdict != "no difference shown" for item in compare_answers(pairs[0], pairs[1], spec)]
    assert np.all(alarms / 150 <= 0.09)


def test_difference_interval_covers_95_percent() -> None:
    generator = np.random.default_rng(5)
    covered = []
    for _ in range(200):
        both = generator.random((2, 200))
        found = compare_answers(answers("adapter", both[0] < 0.8), answers("base", both[1] < 0.65), EvaluateSpec(resamples=300))
        covered.append(found[0].difference.low <= 0.15 <= found[0].difference.high)
    assert 0.90 < np.mean(covered) <= 0.99


def test_groups_replace_mcnemar_by_randomisation() -> None:
    generator = np.random.default_rng(6)
    groups = tuple(row // 30 for row in range(120))
    left = answers("adapter", generator.random(120) < 0.9, groups=groups)
    right = answers("base", generator.random(120) < 0.5, groups=groups)
    accuracy = compare_answers(left, right, QUICK)[0]
    assert accuracy.test == "paired randomisation"
    assert accuracy.verdict == "no difference shown"  # four groups cannot fall below p = 1/8


def test_losses_of_any_rows_are_compared_by_token() -> None:
    generator = np.random.default_rng(7)
    tokens = generator.integers(5, 200, size=150)
    base = tokens * generator.normal(2.5, 0.4, size=150)
    adapter = base - tokens * generator.normal(0.2, 0.3, size=150)
    found = compare_losses(RowLosses("adapter", adapter, tokens), RowLosses("base", base, tokens), QUICK)
    assert found.difference.value == pytest.approx((adapter.sum() - base.sum()) / tokens.sum())
    assert found.verdict == "better" and found.metric == "loss" and not found.higher_is_better
    few = [RowLosses(name, losses[:4], tokens[:4]) for name, losses in (("adapter", adapter), ("base", base))]
    assert compare_losses(few[0], few[1], QUICK).verdict == "no difference shown"


def test_different_rows_are_refused() -> None:
    with pytest.raises(DataError, match="4 rows, 2 labels; 5 rows, 2 labels"):
        compare_answers(answers("adapter", np.ones(4, dtype=bool)), answers("base", np.ones(5, dtype=bool)), QUICK)
    with pytest.raises(DataError, match="different rows or tokens"):
        compare_losses(RowLosses("a", np.ones(2), np.array([1, 2])), RowLosses("b", np.ones(2), np.array([1, 3])), QUICK)


def trial(seed: int, gain: float) -> Callable[[EvaluateSpec], Comparison]:
    """A trial whose losses are `gain` below those of the base, and scatter."""
    generator = np.random.default_rng(seed)
    base = generator.normal(3, 1, 40)
    losses = base - gain + 0.3 * generator.normal(size=40)
    tokens = np.ones(40, dtype=np.int64)
    return partial(compare_losses, RowLosses(f"trial {seed}", losses, tokens), RowLosses("base", base, tokens))


def test_holm_corrects_for_the_number_of_comparisons_and_keeps_their_order() -> None:
    """Holm's own steps: the smallest times m, the next times m - 1, never falling."""
    spec = EvaluateSpec(resamples=4000)
    given = [trial(seed, gain) for seed, gain in enumerate((0.1, 0.3, 0.12, 0.0))]
    alone, found = [one(spec) for one in given], holm(given, spec)
    by_p = sorted(range(4), key=lambda index: alone[index].p_value)
    expected, last = [0.0] * 4, 0.0
    for rank, index in enumerate(by_p):
        expected[index] = last = max(last, min(1.0, (4 - rank) * alone[index].p_value))
    assert [one.p_value for one in found] == expected
    assert [one.left for one in found] == [one.left for one in alone] and "Holm over 4" in found[0].test
    assert holm([], spec) == () and holm(given[:1], spec)[0].p_value == alone[0].p_value


def test_intervals_of_many_comparisons_widen_with_their_p_values() -> None:
    """After Holm's correction too, an interval touches zero exactly where p says that no difference is shown."""
    spec = EvaluateSpec(resamples=1500)
    seen = set()
    for start in range(0, 60, 6):
        given = [trial(seed, 0.03 * (seed % 6)) for seed in range(start, start + 6)]
        alone = [one(spec) for one in given]
        for before, one in zip(alone, holm(given, spec, beside=2), strict=True):
            assert one.difference.excludes_zero == (one.p_value < 0.05) == (one.verdict != "no difference shown")
            seen.add((before.verdict != "no difference shown", one.verdict != "no difference shown"))
    assert seen == {(True, True), (True, False), (False, False)}


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
def test_equal_settings_are_distinguished_in_at_most_one_case_of_twenty(seed_noise: float, seeds: int) -> None:
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


SPEC = EvaluateSpec(resamples=500)


def losses(system: str, factor: float) -> RowLosses:
    return RowLosses(system, factor * np.random.default_rng(0).uniform(1, 3, 40), np.full(40, 7))


def test_the_share_is_of_the_fall_in_loss() -> None:
    base, adapter = losses("base", 2.0), losses("adapter", 1.0)
    assert surviving_share(base, adapter, adapter, SPEC).value == 1
    assert surviving_share(base, adapter, base, SPEC).value == 0
    share = surviving_share(base, adapter, losses("packed", 1.25), SPEC)
    assert share.value == pytest.approx(0.75) and share.n == 40
    assert surviving_share(base, adapter, losses("worse", 2.5), SPEC).value == pytest.approx(-0.5)


def test_rows_with_labels_count_by_the_log_loss() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6]])
    answers = Answers("packed", ("a", "b"), np.array([0, 0]), np.log(probabilities))
    np.testing.assert_allclose(per_row(answers), -np.log([0.9, 0.4]))


def test_what_cannot_be_compared_is_refused() -> None:
    base = losses("base", 1.0)
    with pytest.raises(DataError, match="gained nothing over its base on these 40 held-out rows"):
        surviving_share(base, losses("adapter", 1.5), base, SPEC)
    short = RowLosses("packed", base.losses[:9], base.tokens[:9])
    with pytest.raises(DataError, match="40, 40, 9 rows"):
        surviving_share(base, losses("adapter", 0.5), short, SPEC)

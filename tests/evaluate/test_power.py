"""`evaluate.power`: the number of rows, checked by simulation of what it promises."""

from __future__ import annotations

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.power import CORRELATION, PairedPower, paired_power, rows_below


def test_the_textbook_number() -> None:
    """n = ((1.96 + 0.84)·sd/δ)²."""
    power = PairedPower(100, 0.5, 0.95)
    assert power.rows_for(0.1) == 197 and power.smallest == pytest.approx(2.8016 * 0.05, rel=1e-3)
    assert power.rows_for(power.smallest) == 100


def test_a_true_difference_of_that_size_is_found_four_times_in_five() -> None:
    chance = np.random.default_rng(0)
    power = PairedPower(80, 1.0, 0.95)
    draws = chance.normal(power.smallest, 1.0, size=(4000, 80))
    found = np.abs(draws.mean(1)) > 1.96 * draws.std(1, ddof=1) / np.sqrt(80)
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_the_spread_is_that_of_a_difference_of_correlated_losses() -> None:
    chance = np.random.default_rng(0)
    n = 20000
    shared = chance.normal(0, np.sqrt(CORRELATION), n)
    left, right = (5 + shared + chance.normal(0, np.sqrt(1 - CORRELATION), n) for _ in range(2))
    power = paired_power(left, np.ones(n), confidence=0.95)
    assert power.spread == pytest.approx(np.std(left - right), rel=0.03) and power.rows == n


def test_a_row_counts_by_what_is_unusual_of_it_not_by_its_length() -> None:
    tokens = np.array([1.0, 5.0, 10.0, 50.0])
    assert paired_power(2.0 * tokens, tokens, confidence=0.95).spread == pytest.approx(0, abs=1e-12)


def test_too_few_rows_are_said_with_the_number_needed() -> None:
    said = PairedPower(20, 0.5, 0.95).sentence(0.05)
    assert "20 rows show a difference of 0.313 nats" in said and "Too few rows" in said and "needs about 785." in said
    assert "Too few" not in PairedPower(1000, 0.5, 0.95).sentence(0.05)
    with pytest.raises(DataError, match="1 held-out rows cannot distinguish two trials"):
        paired_power(np.ones(1), np.ones(1), confidence=0.95)


def test_rows_that_are_half_of_others_are_named_with_those() -> None:
    said = PairedPower(20, 0.5, 0.95).sentence(0.05, "the held-out rows")
    assert said.endswith("that needs about 785, and they are half of the held-out rows: hold out about 1,570 rows.")


def test_so_many_rows_end_below_a_bound_four_times_in_five() -> None:
    chance = np.random.default_rng(0)
    needed = rows_below(40, 1.96 / np.sqrt(40), 0.2, 0.95)  # of a spread of 1
    draws = chance.normal(0.0, 1.0, size=(4000, needed))
    ends = draws.mean(1) + 1.96 * draws.std(1, ddof=1) / np.sqrt(needed)
    assert np.mean(ends < 0.2) == pytest.approx(0.8, abs=0.03)


def test_rows_of_a_group_count_once() -> None:
    chance = np.random.default_rng(0)
    losses, tokens = chance.gamma(2, 3, 30), np.full(30, 4.0)
    once = paired_power(losses, tokens, confidence=0.95)
    twice = paired_power(np.tile(losses, 2), np.tile(tokens, 2), confidence=0.95, groups=tuple(range(30)) * 2)
    assert (twice.rows, twice.smallest) == (30, pytest.approx(once.smallest))
    assert "30 groups of rows show a difference of" in twice.sentence(1e-9) and "Too few groups of rows" in twice.sentence(1e-9)
    with pytest.raises(DataError, match="1 held-out groups of rows"):
        paired_power(losses, tokens, confidence=0.95, groups=["one"] * 30)

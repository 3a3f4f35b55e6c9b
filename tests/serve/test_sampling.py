"""Tokens are drawn from the nucleus with the shares that the model gives, and a seed decides them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lorakeet.serve.sampling import Sampling, TokenSampler, rows_finite

LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()


def drawn(count: int, **settings: float) -> Counter[int]:
    chooser = TokenSampler(Sampling(seed=3, **settings))  # type: ignore[arg-type]
    return Counter(chooser.choose(LOGITS).token for _ in range(count))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert drawn(5, temperature=0.0) == {0: 5}


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_tiny_temperature_takes_the_likeliest_too(top_p: float) -> None:
    for temperature in (1e-3, 1e-39, 5e-324):
        assert drawn(5, temperature=temperature, top_p=top_p) == {0: 5}


def test_shares_are_those_of_the_model() -> None:
    found = drawn(4000)
    for token, share in enumerate((0.4, 0.1, 0.3, 0.2)):
        assert found[token] / 4000 == pytest.approx(share, abs=0.04)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    assert set(drawn(500, top_p=0.65)) == {0, 2}
    assert set(drawn(500, top_p=0.75)) == {0, 2, 3}
    assert set(drawn(50, top_p=0.05)) == {0}


def test_a_seed_decides() -> None:
    first, second = (TokenSampler(Sampling(seed=5)) for _ in range(2))
    assert [first.choose(LOGITS).token for _ in range(20)] == [second.choose(LOGITS).token for _ in range(20)]


def test_logprobs_do_not_depend_on_temperature() -> None:
    for temperature in (0.0, 2.0):
        chosen = TokenSampler(Sampling(temperature=temperature, seed=0, logprobs=2)).choose(LOGITS)
        assert chosen.logprob == pytest.approx(float(LOGITS[chosen.token]))
        assert [token for token, _ in chosen.top] == [0, 2]
    assert TokenSampler(Sampling(seed=0)).choose(LOGITS).logprob is None


def test_rows_that_hold_a_number_which_is_not_finite_are_reported() -> None:
    rows = torch.zeros(5, 7)
    assert rows_finite(rows) == [True] * 5
    rows[1, 3], rows[2, 0], rows[3, 5], rows[3, 6] = torch.nan, -torch.inf, torch.inf, -torch.inf
    rows[4] = torch.finfo(torch.float32).max  # whose sum is infinite
    assert rows_finite(rows) == [True, False, False, False, True]
    assert rows_finite(rows[:1]) == [True]

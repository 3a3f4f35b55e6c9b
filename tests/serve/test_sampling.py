"""Tokens are drawn from the nucleus with the shares that the model gives, and a seed decides them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lorakeet.errors import ConfigError
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


def test_top_k_and_min_p_keep_the_likeliest() -> None:
    assert set(drawn(500, top_k=2)) == {0, 2} and set(drawn(500, top_k=9)) == {0, 1, 2, 3}
    assert set(drawn(500, min_p=0.6)) == {0, 2}, "0.3 of 0.4 is 0.75, 0.2 of 0.4 is 0.5"
    found = drawn(4000, top_k=2)
    assert found[0] / 4000 == pytest.approx(0.4 / 0.7, abs=0.04)
    assert set(drawn(500, top_k=3, top_p=0.7)) == {0, 2}, "the nucleus is that of the tokens that top_k has left"


def test_presence_and_frequency_are_subtracted_for_what_the_text_has() -> None:
    chooser = TokenSampler(Sampling(temperature=0.0, presence_penalty=0.1, frequency_penalty=0.3, logprobs=0), prompt=(0, 0))
    assert [chooser.choose(LOGITS).token for _ in range(6)] == [0, 2, 0, 2, 3, 0], "log 0.4 − 0.4 < log 0.3, and so on"
    free = TokenSampler(Sampling(temperature=0.0))
    assert [free.choose(LOGITS).token for _ in range(3)] == [0, 0, 0]


def test_a_penalty_does_not_change_the_reported_log_probabilities() -> None:
    chooser = TokenSampler(Sampling(temperature=0.0, frequency_penalty=2.0, logprobs=1))
    found = [chooser.choose(LOGITS) for _ in range(2)]
    assert [one.token for one in found] == [0, 2] and found[1].logprob == pytest.approx(float(LOGITS[2]))


def test_repetition_counts_the_prompt_and_only_its_window() -> None:
    logits = torch.tensor([2.0, 1.5, -0.5])
    for prompt, window, expected in (((0, 2), None, 1), ((0, 2), 1, 0), ((0, 0), 0, 0)):
        sampling = Sampling(temperature=0.0, repetition_penalty=1.5, penalty_window=window)
        assert TokenSampler(sampling, prompt=prompt).choose(logits).token == expected
    negative = torch.tensor([-1.0, -1.2])
    assert TokenSampler(Sampling(temperature=0.0, repetition_penalty=1.5), prompt=(0,)).choose(negative).token == 1


def test_a_bias_is_added() -> None:
    assert drawn(5, temperature=0.0, logit_bias={1: 5.0}) == {1: 5}  # type: ignore[arg-type]
    assert set(drawn(200, logit_bias={0: -100.0, 2: -100.0})) == {1, 3}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_k": -2}, "top_k is -2"), ({"min_p": 1.5}, "min_p is 1.5"), ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"), ({"logit_bias": {1: 101.0}}, "logit_bias must have"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**given).check()

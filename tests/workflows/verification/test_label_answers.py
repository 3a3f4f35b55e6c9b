"""Answers of an artefact: what rounding explains is no failure, what it cannot explain is one; few rows are enough for both."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorakeet.data.chat import Candidates
from lorakeet.evaluate.certificate import Check
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.tolerances import F16, F32, Q4, Q8, Allowed
from lorakeet.workflows.verification.label_answers import ALARM, compare_label_scores, most_different

SPEC = EvaluateSpec(resamples=100)
EMPTY = np.array([1], np.int64)


def checked(margins: list[float], allowed: Allowed, n: int = 8, tokens: int = 1) -> Check:
    """A check of `n` rows; the artefact answers the first ones otherwise, which the live adapter prefers by `margins`."""
    ours = [np.array([0.0, -3.0, -9.0])] * n
    theirs = list(ours)
    for place, margin in enumerate(margins):
        ours[place], theirs[place] = np.array([0.0, -margin, -9.0]), np.array([-0.2, 0.0, -9.0])
    rows = [Candidates(EMPTY, (EMPTY,) * 3, str(place), 0, False) for place in range(n)]
    return compare_label_scores(("live", "file"), (ours, theirs), [tokens] * n, rows, allowed, SPEC)


def test_two_close_answers_of_eight_are_what_eight_bits_explain() -> None:
    found = checked([0.1, 0.6], Q8)
    assert found.passed and found.measured == {"different_answers": 0.25, "decided_differences": 0.0}
    assert "Of 8 answers 2 differ, which the live adapter prefers by 0.1, 0.6 nats" in found.detail
    assert found.estimates["accuracy_live"].value == 1.0 and found.estimates["accuracy_there"].value == 0.75


@pytest.mark.parametrize(("allowed", "margin"), [(Q8, 1.5), (F16, 0.2), (F32, 0.02), (Q4, 3.5)])
def test_an_answer_that_was_decided_is_a_failure(allowed: Allowed, margin: float) -> None:
    found = checked([margin] * (1 + int(8 * allowed.metric)), allowed)
    assert not found.passed and "decided_differences" in found.exceeded()
    assert not checked([margin], allowed).passed or allowed is Q4


def test_a_label_of_several_tokens_may_be_off_at_each() -> None:
    assert not checked([1.3], Q8).passed and checked([1.3], Q8, tokens=2).passed and not checked([1.5], Q8, tokens=2).passed


@pytest.mark.parametrize(("allowed", "n", "most"), [(Q8, 8, 3), (Q8, 16, 5), (F16, 8, 2), (F32, 8, 1)])
def test_more_changes_than_chance_gives_are_a_failure_however_close(allowed: Allowed, n: int, most: int) -> None:
    assert most_different(n, allowed.metric) == most
    close = allowed.gap / 2
    assert checked([close] * most, allowed, n).passed and not checked([close] * (most + 1), allowed, n).passed


@pytest.mark.parametrize("n", [1, 8, 16, 64])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.4])
def test_the_stated_rate_of_false_alarms_is_kept_and_used(n: int, rate: float) -> None:
    def above(k: int) -> float:
        return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k + 1, n + 1))

    most = most_different(n, rate)
    assert above(most) <= ALARM and (most == 0 or above(most - 1) > ALARM)

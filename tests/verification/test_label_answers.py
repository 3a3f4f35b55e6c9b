"""Answers of an artefact: what rounding explains is no failure, what it cannot explain is one; few rows are enough for both."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.data.chat import Candidates
from lorakeet.evaluate.certificate import Check
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.tolerances import F16, F32, Q2, Q3, Q4, Q8, Allowed
from lorakeet.verification.label_answers import (
    ALARM,
    ALIKE,
    MOST_ROWS,
    check_label_answers,
    compare_label_scores,
    most_different,
    random_passes,
    rows_that_tell,
    weak_answers,
)
from lorakeet.verification.probes import Probes

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


@pytest.mark.parametrize("side", [0, 1])
def test_a_score_that_is_no_number_is_a_failure_and_is_named(side: int) -> None:
    fine, broken = np.array([0.0, -3.0]), np.array([math.nan, math.nan])  # whose likeliest is the same
    scores = ([fine] * 8, [*[fine] * 7, broken])
    rows = [Candidates(EMPTY, (EMPTY,) * 2, f"row {place}", 0, False) for place in range(8)]
    both = scores if side else scores[::-1]
    found = compare_label_scores(("live", "file"), both, [1] * 8, rows, Q4, SPEC)
    assert not found.passed and found.exceeded() == ("undefined_scores",)
    assert "1 of 8 rows have scores that are no numbers (NaN), the first row 7" in found.detail


@pytest.mark.parametrize(("n", "labels", "rate"), [(8, 2, 0.25), (16, 3, 0.1), (5, 4, 0.6)])
def test_the_share_of_random_answers_that_pass_is_exact(n: int, labels: int, rate: float) -> None:
    other = 1 - 1 / labels
    passing = sum(math.comb(n, i) * other**i * (1 - other) ** (n - i) for i in range(most_different(n, rate) + 1))
    assert random_passes(n, labels, rate) == pytest.approx(passing)
    assert random_passes(2, 2, 0.9) == 1.0, "all may differ"


def two_labels(n: int) -> list[Candidates]:
    return [Candidates(EMPTY, (np.array([2]), np.array([3])), f"{place}", 0, False) for place in range(n)]


def test_few_bits_take_the_fewest_rows_that_tell_random_answers() -> None:
    few = two_labels(8)
    assert random_passes(8, 2, Q4.metric) > 0.8
    enough = rows_that_tell(few, Q4)
    assert random_passes(enough, 2, Q4.metric) <= ALIKE < random_passes(enough - 1, 2, Q4.metric) and enough == 58
    assert rows_that_tell(two_labels(16), F16) == rows_that_tell(few, F32) + 8 == 16
    assert rows_that_tell(few, Q2) == 8 and rows_that_tell(few, Q3) == 8, "no number up to MOST_ROWS tells them"
    assert random_passes(MOST_ROWS, 2, Q3.metric) > ALIKE


class Side:
    """Label 0 or 1 of each row, by its number; the likelier by `margin` nats."""

    def __init__(self, name: str, answers: list[int], margin: float, allowed: Allowed) -> None:
        self.name, self.answers, self.margin, self.allowed = name, answers, margin, allowed
        self.text: Any = SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[]))
        self.number = -1

    def logits(self, ids: list[int], last: int | None = None) -> Any:
        self.number += 1
        table = torch.zeros(1, 4)
        table[0, 2 + self.answers[self.number]] = self.margin
        return table


@pytest.mark.parametrize(("there", "passes"), [(120, False), (20, True)])
def test_random_answers_fail_where_the_run_has_the_rows_and_are_a_named_weakness_where_not(there: int, passes: bool) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 2, 128).tolist(), rng.integers(0, 2, 128).tolist()
    live: Any = Side("live", ours, 2.2, F32)
    artefact: Any = Side("file", theirs, 2.2, Q4)
    rows = two_labels(there)
    taken: list[int] = []
    probes = Probes([], [], [], rows[:8], [], further=lambda count: (taken.append(count), rows[8 : 8 + count])[1])
    found = check_label_answers(live, artefact, probes, SPEC)
    weak = weak_answers([found], probes.labelled, Q4)
    assert taken == [50] and found.n == min(there, 58) and found.passed is passes
    if passes:
        assert weak is not None and "better than random ones of file, since 20 rows cannot tell: 4 bits may" in str(weak)
    else:
        assert weak is None

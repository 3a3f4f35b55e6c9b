"""A judge's preference in a report: a comparison with its interval, or why there is none."""

from __future__ import annotations

import numpy as np

from lorakeet.evaluate.judge import JudgeVotes
from lorakeet.evaluate.report.compose_judge import JUDGE_WINS, with_judge
from lorakeet.evaluate.report.report import Report, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec

REPORT = Report("t", task="language", systems=(SystemResult("adapter", "adapter", {}), SystemResult("base", "base", {})))
SYSTEMS, SPEC = ("adapter", "base"), EvaluateSpec(resamples=500)


def votes(adapter_first: list[float], base_first: list[float]) -> JudgeVotes:
    return JudgeVotes("model", np.array([adapter_first, base_first]).T)


def test_a_preference_is_a_metric_of_both_and_a_comparison() -> None:
    found = with_judge(REPORT, votes([1.0] * 18 + [0.0] * 2, [0.0] * 18 + [1.0] * 2), SYSTEMS, SPEC)
    shares = [system.metrics[JUDGE_WINS].value for system in found.systems]
    assert np.allclose(shares, [0.9, 0.1])
    (compared,) = found.comparisons
    assert compared.verdict == "better" and "read first is preferred by 0" in compared.test and not found.warnings


def test_a_bias_that_exceeds_the_effect_leaves_no_comparison() -> None:
    found = with_judge(REPORT, votes([1.0] * 20, [1.0] * 16 + [0.0] * 4), SYSTEMS, SPEC)
    assert not found.comparisons and "no verdict" in found.warnings[0]


def test_missing_votes_are_said_and_too_few_give_no_result() -> None:
    nan = float("nan")
    some = with_judge(REPORT, votes([1.0] * 8 + [nan] * 2, [0.0] * 10), SYSTEMS, SPEC)
    assert "2 of 10 prompts; they are left out" in some.warnings[0] and some.comparisons[0].difference.n == 8
    few = with_judge(REPORT, votes([nan] * 6 + [1.0] * 4, [0.0] * 10), SYSTEMS, SPEC)
    assert "for 4 of 10 prompts with other replies, too few" in few.warnings[0] and not few.comparisons


def test_equal_replies_are_no_votes() -> None:
    nan = float("nan")
    unread = JudgeVotes("model", np.array([[0.5, 0.5]] * 6 + [[nan, nan]] * 4), equal=6)
    found = with_judge(REPORT, unread, SYSTEMS, SPEC)
    assert "for 0 of 4 prompts" in found.warnings[0] and JUDGE_WINS not in found.systems[0].metrics

from __future__ import annotations

import pytest

from lorakeet.evaluate.compare import Comparison, Verdict
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.verdict import verdict_of


def comparison(right: str, verdict: Verdict, value: float, *, metric: str = "accuracy") -> Comparison:
    difference = Estimate(value, value - 0.04, value + 0.04, 379, "BCa bootstrap", 0.95, 0)
    return Comparison("adapter", right, metric, difference, 0.01, "exact McNemar", metric == "accuracy", verdict)


@pytest.mark.parametrize(
    ("first", "second", "sentence", "tone"),
    [
        (
            ("better", 0.17),
            ("better", 0.06),
            "by +0.170 accuracy (95 % interval +0.130 to +0.210), and X by +0.060 (+0.020",
            "better",
        ),
        (
            ("better", 0.17),
            ("no difference shown", 0.02),
            "; but no difference from X is shown: +0.020 (−0.020 to +0.060).",
            "mixed",
        ),
        (("better", 0.17), ("worse", -0.06), ", but is worse than X by −0.060", "mixed"),
        (
            ("no difference shown", 0.01),
            ("no difference shown", 0.02),
            "No difference shown between the adapter and its base",
            "none",
        ),
        (("worse", -0.1), ("worse", -0.2), "The adapter is worse than its base by −0.100 accuracy", "worse"),
        (("no difference shown", 0.01), ("better", 0.2), "; but beats X by +0.200", "mixed"),
    ],
)
def test_sentences(first: tuple[Verdict, float], second: tuple[Verdict, float], sentence: str, tone: str) -> None:
    found = verdict_of([comparison("base", *first), comparison("X", *second)])
    assert found is not None and sentence in found.sentence and found.tone == tone


def test_loss_is_spoken_of_where_there_is_no_accuracy() -> None:
    found = verdict_of([comparison("base", "better", -0.2, metric="loss")])
    assert found is not None
    assert found.sentence == "The adapter beats its base: −0.200 nats a token (95 % interval −0.240 to −0.160)."


def test_other_metrics_alone_make_no_headline() -> None:
    assert verdict_of([comparison("base", "better", 0.1, metric="macro_f1")]) is None
    assert verdict_of([]) is None

from __future__ import annotations

import pytest

from lorakeet.evaluate.baselines import MAJORITY, TFIDF
from lorakeet.evaluate.compare import Comparison, Verdict
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.verdict import noted, verdict_of


def comparison(right: str, verdict: Verdict, value: float, *, metric: str = "accuracy") -> Comparison:
    difference = Estimate(value, value - 0.04, value + 0.04, 379, "BCa bootstrap", 0.95, 0)
    return Comparison("adapter", right, metric, difference, 0.01, "McNemar", metric in ("accuracy", "exact_match"), verdict)


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
        (("better", 0.17), ("worse", -0.06), ", but is worse than X: −0.060", "mixed"),
        (
            ("no difference shown", 0.01),
            ("no difference shown", 0.02),
            "No difference shown between the adapter and its base",
            "none",
        ),
        (("worse", -0.1), ("worse", -0.2), "The adapter is worse than its base: −0.100 accuracy", "worse"),
        (("no difference shown", 0.01), ("better", 0.2), "; but it beats X by +0.200", "mixed"),
        (("no difference shown", 0.01), ("worse", -0.2), "; and it is worse than X: −0.200", "mixed"),
    ],
)
def test_sentences(first: tuple[Verdict, float], second: tuple[Verdict, float], sentence: str, tone: str) -> None:
    found = verdict_of([comparison("base", *first), comparison("X", *second)])
    assert found is not None and sentence in found.sentence and found.tone == tone


def test_a_note_is_a_further_sentence() -> None:
    found = verdict_of([comparison("base", "better", 0.2)])
    assert found is not None and noted(found, "") is found and noted(None, "6 of 10 rows were DROPPED") is None
    more = noted(found, "6 of 10 rows were DROPPED")
    assert more is not None and more.tone == found.tone
    assert more.sentence == f"{found.sentence} 6 of 10 rows were DROPPED."


def test_what_follows_is_said_where_a_method_without_a_model_is_not_beaten() -> None:
    """A newcomer's case: TF-IDF ahead in every measure, and "no difference is shown" was all that was said of it."""
    base, level = comparison("base", "better", 0.2), comparison(TFIDF, "no difference shown", -0.06)
    found = verdict_of([base, level])
    assert found is not None and found.sentence.endswith(
        "is shown: −0.060 (−0.100 to −0.020). That method, without a language model, may do as well."
    )
    surer = verdict_of([base, level, comparison(TFIDF, "worse", 0.4, metric="log_loss")])
    assert surer is not None and surer.sentence.endswith("may do as well: the adapter has +0.400 log-loss (+0.360 to +0.440).")
    behind = verdict_of([base, comparison(MAJORITY, "worse", -0.1)])
    assert behind is not None and behind.sentence.endswith("−0.100 (−0.140 to −0.060). That method needs no language model.")
    before = verdict_of([base, comparison(MAJORITY, "worse", -0.1), comparison(TFIDF, "better", 0.1)])
    assert before is not None and before.sentence.endswith("The majority class needs no language model.")
    ahead = verdict_of([base, comparison(TFIDF, "better", 0.1)])
    assert ahead is not None and "without a language model" not in ahead.sentence


def test_loss_is_spoken_of_where_there_is_no_accuracy() -> None:
    found = verdict_of([comparison("base", "better", -0.2, metric="loss")])
    assert found is not None
    assert found.sentence == "The adapter beats its base: −0.200 nats a token (95 % interval −0.240 to −0.160)."


def test_nothing_compared_makes_no_headline() -> None:
    assert verdict_of([]) is None


def test_a_lower_loss_alone_is_no_headline_where_replies_were_compared() -> None:
    """The first users' case: −2.986 nats against a base that did not know the format, and not one right answer."""
    replies = comparison("base", "no difference shown", 0.0, metric="exact_match")
    lower = comparison("base", "better", -2.986, metric="loss")
    found = verdict_of([replies, lower])
    assert found is not None and found.tone == "none"
    assert found.sentence == (
        "No better answers are shown, though the loss is lower: −2.986 nats a token (−3.026 to −2.946). No difference shown "
        "between the adapter and its base: 0.000 exact match (95 % interval −0.040 to +0.040)."
    )
    worse = verdict_of([comparison("base", "worse", -0.3, metric="exact_match"), lower])
    assert worse is not None and worse.sentence.startswith("The answers are worse, though the loss is lower")
    better = verdict_of([comparison("base", "better", 0.5, metric="exact_match"), lower])
    assert better is not None and better.sentence.startswith("The adapter beats its base by +0.500 exact match")


def test_a_format_that_was_learnt_is_said_where_no_reply_is_right() -> None:
    """A newcomer's case: valid JSON 1.00 against 0.07, and no value right in any system."""
    matches = [comparison(name, "no difference shown", 0.0, metric="json_match") for name in ("base", "few-shot base")]
    nearer = [comparison("base", "better", 0.93, metric="valid_json"), comparison("base", "better", 0.59, metric="chrf")]
    other = comparison("few-shot base", "no difference shown", -0.02, metric="chrf")
    found = verdict_of([*matches, *nearer, other])
    assert found is not None and found.tone == "none"
    assert found.sentence.endswith(
        "It gains +0.930 valid JSON (+0.890 to +0.970), and +0.590 chrF (+0.550 to +0.630)."
    ), found.sentence

"""Metrics of replies: against known values and other libraries, in several scripts, and which of them decides."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from lorakeet.errors import DataError
from lorakeet.evaluate import replies as scoring
from lorakeet.evaluate.reading.conventions import conventions_of
from lorakeet.evaluate.replies import SCORES, Replies, compare_replies, main_metric, measure_replies, metrics_shown, repeats
from lorakeet.evaluate.spec import EvaluateSpec

SPEC = EvaluateSpec(resamples=200)


@pytest.mark.parametrize(
    ("name", "reply", "reference", "expected"),
    [
        ("exact_match", " A01 ", "A01", 1.0),
        ("exact_match", "a01", "A01", 0.0),
        ("normalised_match", "The Answer:  a01.", "the answer a01", 1.0),
        ("normalised_match", "Ａ０１", "a01", 1.0),  # full-width forms are the same under NFKC
        ("normalised_match", "答案是甲。", "答案是甲", 1.0),
        ("normalised_match", "?", "!", 0.0),
        ("token_f1", "the red cat", "a red cat", 2 / 3),
        ("token_f1", "甲乙丙", "甲乙丁", 2 / 3),  # by characters
        ("rouge_l", "police kill the gunman", "police killed the gunman", 0.75),
        ("json_match", '{"b": 1.0, "a": [2]}', '{"a":[2],"b":1}', 1.0),
        ("json_match", '{"a": 2', '{"a": 2}', 0.0),
        ("valid_json", '{"a": 3}', '{"a": 2}', 1.0),
        ("valid_json", "no", "{}", 0.0),
        ("numeric_match", "It is 1,234.50 in all", "1234.5", 1.0),
        ("numeric_match", "−3", "-3", 1.0),
        ("numeric_match", "no idea", "3", 0.0),
        ("json_match", '{"ok": 1}', '{"ok": true}', 0.0),
        ("numeric_match", "the range is 10-12", "12", 1.0),
        ("numeric_match", "x=.5", "0.5", 1.0),
        ("normalised_match", "-5", "5", 0.0),
        ("normalised_match", "की", "का", 0.0),  # vowels of Indic scripts are marks
        ("normalised_match", "กิน", "กัน", 0.0),
        ("chrf", "the same text", "the same text", 1.0),
        ("chrf", "", "the same text", 0.0),
    ],
)
def test_known_values(name: str, reply: str, reference: str, expected: float) -> None:
    assert SCORES[name](reply, reference) == pytest.approx(expected)


WORDS = st.lists(st.sampled_from(["red", "cat", "sat", "on", "mat", "the"]), min_size=1, max_size=12).map(" ".join)


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_library_on_english(reply: str, reference: str) -> None:
    expected = RougeScorer(["rougeL"]).score(reference, reply)["rougeL"].fmeasure
    assert scoring.rouge_l(reply, reference) == pytest.approx(expected)


@given(st.sampled_from(list(SCORES)), st.text(max_size=30), st.text(max_size=30))
def test_every_metric_is_a_share_and_full_for_the_reference_itself(name: str, reply: str, reference: str) -> None:
    assert 0.0 <= SCORES[name](reply, reference) <= 1.0
    if name in ("exact_match", "normalised_match", "token_f1", "rouge_l"):
        assert SCORES[name](reference, reference) == 1.0


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (['{"a": 1}', "[2]"], "json_match"),
        (["12", "-3.5", "$4,000"], "numeric_match"),
        (["A01.1", "B02"], "normalised_match"),
        (["a long answer of rather more than eight words in all"] * 3, "chrf"),
        (["日本語の長い答えはここにありますから"] * 3, "chrf"),
    ],
)
def test_the_references_decide_the_main_metric(references: list[str], expected: str) -> None:
    how = conventions_of(tuple(references))
    assert main_metric(how) == expected and metrics_shown(expected, how)[0] == expected


def test_replies_that_went_wrong_are_counted() -> None:
    texts = ("", "I'm sorry, but I cannot do that.", "no no no no " * 4, "fine")
    found = measure_replies(Replies("base", texts, ("fine",) * 4, (False, False, True, False)), "normalised_match", SPEC)
    assert {name: found[name].value for name in scoring.FAULTS} == dict.fromkeys(scoring.FAULTS, 0.25)
    assert found["normalised_match"].value == 0.25 and next(iter(found)) == "normalised_match"
    assert repeats("a b c d a b c d a b c d") and not repeats("a b c d a b c d")


def test_two_systems_are_compared_prompt_by_prompt() -> None:
    references = tuple(f"code {number}" for number in range(40))
    right = Replies("adapter", references, references)
    wrong = Replies("base", ("code x",) * 40, references)
    found = compare_replies(right, wrong, "exact_match", SPEC)
    assert found.verdict == "better" and found.test == "McNemar"
    assert found.paired is not None and found.paired.only_left == 40
    assert compare_replies(right, wrong, "chrf", SPEC).test == "paired randomisation"
    assert compare_replies(right, right, "exact_match", SPEC).verdict == "no difference shown"
    with pytest.raises(DataError, match="replied to different prompts"):
        compare_replies(right, Replies("base", ("a",) * 40, ("b",) * 40), "exact_match", SPEC)


def test_each_reply_is_scored_once() -> None:
    """A metric of one's own may be slow, or not give the same twice."""
    calls: list[str] = []

    def own(reply: str, reference: str) -> float:
        calls.append(reply)
        return 0.5

    left, right = Replies("adapter", ("a", "b"), ("x", "y")), Replies("base", ("c", "d"), ("x", "y"))
    for _ in range(2):
        measure_replies(left, "mine", SPEC, own)
        compare_replies(left, right, "mine", SPEC, own)
    assert sorted(calls) == ["a", "b", "c", "d"]


def test_an_own_metric_must_be_a_number() -> None:
    replies = Replies("adapter", ("abc",), ("ab",))
    assert scoring.reply_scores(replies, "mine", lambda reply, reference: len(reply) - len(reference)).tolist() == [1.0]
    with pytest.raises(DataError, match="metric 'mine' of reply 0 is nan"):
        scoring.reply_scores(replies, "mine", lambda reply, reference: math.nan)
    with pytest.raises(DataError, match="no metric 'mine'"):
        scoring.reply_scores(replies, "mine")

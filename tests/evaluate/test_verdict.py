from __future__ import annotations

import numpy as np
import pytest

from lorakeet.evaluate.baselines import CONSTANT, MAJORITY, MEDIAN, NEAREST, TFIDF
from lorakeet.evaluate.compare import Comparison, Verdict, paired_verdict
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.replies import SHOWN
from lorakeet.evaluate.verdict import WITHOUT_MODEL, noted, verdict_of
from lorakeet.evaluate.wording import all_metric_words, metric_words


def comparison(right: str, verdict: Verdict, value: float, *, metric: str = "accuracy") -> Comparison:
    difference = Estimate(value, value - 0.04, value + 0.04, 379, "BCa bootstrap", 0.95, 0)
    return Comparison("adapter", right, metric, difference, 0.01, "McNemar", metric in ("accuracy", "exact_match"), verdict)


@pytest.mark.parametrize(
    ("first", "second", "sentence", "tone"),
    [
        (
            ("better", 0.17),
            ("better", 0.06),
            "by +17.0 points of accuracy (95 % interval +13.0 to +21.0), and X by +6.0 points (+2.0",
            "better",
        ),
        (
            ("better", 0.17),
            ("no difference shown", 0.02),
            "; but no difference from X is shown: +2.0 points (−2.0 to +6.0).",
            "mixed",
        ),
        (("better", 0.17), ("worse", -0.06), ", but is worse than X: −6.0 points", "mixed"),
        (
            ("no difference shown", 0.01),
            ("no difference shown", 0.02),
            "No difference shown between the adapter and its base",
            "none",
        ),
        (("worse", -0.1), ("worse", -0.2), "The adapter is worse than its base: −10.0 points of accuracy", "worse"),
        (("no difference shown", 0.01), ("better", 0.2), "; but it beats X by +20.0 points", "mixed"),
        (("no difference shown", 0.01), ("worse", -0.2), "; and it is worse than X: −20.0 points", "mixed"),
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


def test_nothing_compared_makes_no_headline() -> None:
    assert verdict_of([]) is None


def tables(seed: int, count: int) -> list[list[Comparison]]:
    """Made-up tables of every kind of metrics: each pair of a metric and a rival is better, worse or level at random."""
    generator, found = np.random.default_rng(seed), []
    kinds = [*((*names, "loss") for names in SHOWN.values()), ("accuracy", "macro_f1", "log_loss"), ("mine.py:score", "chrf")]
    for _ in range(count):
        metrics = kinds[generator.integers(len(kinds))]
        rivals = ["base", *generator.permutation(["few-shot base", NEAREST, CONSTANT, MEDIAN, TFIDF, MAJORITY])[:3]]
        table = []
        for metric in metrics:
            for rival in rivals if metric != "loss" else rivals[:1]:
                value, reach, higher = generator.normal(), 1.5 * generator.random(), metric_words(metric).higher_is_better
                difference = Estimate(value, value - reach, value + reach, 64, "made up")
                verdict = paired_verdict(difference, higher_is_better=higher)
                table.append(Comparison("adapter", str(rival), metric, difference, 0.5, "made up", higher, verdict))
        found.append(table)
    return found


@pytest.mark.slow
def test_no_sentence_contradicts_its_own_table() -> None:
    """ "No better answers are shown … may do as well" stood beside a token F1 of 0.938 against 0.573 in the same table."""
    said = dict.fromkeys(("No better answers", "The answers are worse", "may do as well", "needs no language", "alone: "), 0)
    for table in tables(seed=0, count=4000):
        found = verdict_of(table)
        assert found is not None
        sentence, main = found.sentence, table[0].metric
        of_base = {one.metric: one for one in table if one.right == "base"}
        elsewhere = {one.verdict for one in of_base.values() if metric_words(one.metric).of_answers and one.metric != main}
        for words in said:
            said[words] += words in sentence
        if "No better answers" in sentence or "The answers are worse" in sentence:
            assert of_base[main].verdict != "better" and "better" not in elsewhere
        if "may do as well" in sentence or "needs no language model" in sentence:
            named = [one for one in table if one.metric == main and one.right in WITHOUT_MODEL and _ends(one) in sentence]
            level = next(one for one in named if one.verdict != "better")
            assert not [one for one in table if one.right == level.right and one.verdict == "better"], sentence
        if found.tone == "better":
            assert of_base[main].verdict == "better" and "worse" not in elsewhere
        if found.tone == "worse":
            assert of_base[main].verdict == "worse"
        if of_base[main].verdict != "better" and "better" in elsewhere:
            assert " gains " in sentence or "It is better by" in sentence
        if of_base[main].verdict == "better" and "worse" in elsewhere:
            assert "But it is worse by" in sentence and found.tone == "mixed"
        for phrase in found.phrases:  # each number is one of the table, and names its metric where others say something else
            stated = [one for one in table if phrase.interval.endswith(_ends(one))]
            stated = [one for one in stated if metric_words(one.metric).change(one.difference.value) in phrase.text]
            assert bool(stated) == bool(phrase.interval), phrase
            for one in stated[:1]:
                others = {other.verdict for other in table if other.right == one.right and metric_words(other.metric).of_answers}
                if others & {"better": {"worse"}, "worse": {"better"}}.get(one.verdict, {"better", "worse"}):
                    assert metric_words(one.metric).inline in phrase.text, (phrase, sentence)
    assert min(said.values()) >= 20, said


OF_ANSWERS = sorted(name for name, words in all_metric_words().items() if words.of_answers and name != "accuracy")


@pytest.mark.parametrize("metric", [*OF_ANSWERS, "a_new_metric"])
def test_a_headline_names_every_metric_that_says_something_else(metric: str) -> None:
    """Metrics were listed by name: balanced accuracy was missing, and so was each metric of a user's own."""
    shown = Estimate(0.1, 0.05, 0.15, 64, "made up")
    level = Estimate(0.0, -0.1, 0.1, 64, "made up")
    table = [
        Comparison("adapter", "base", "accuracy", level, 0.5, "made up", True, "no difference shown"),
        Comparison("adapter", "base", metric, shown, 0.01, "made up", True, "better"),
    ]
    found = verdict_of(table)
    assert found is not None and metric_words(metric).said(0.1) in found.sentence


def _ends(one: Comparison) -> str:
    return metric_words(one.metric).ends(one.difference, signs=True)

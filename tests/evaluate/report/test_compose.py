"""Reports on replies and on ordered labels: metrics by the references, comparisons in all of them, headlines that agree."""

from __future__ import annotations

import numpy as np
import pytest

from lorakeet.evaluate.answers import answers_from_probabilities
from lorakeet.evaluate.baselines import MEDIAN, constant_answer, median_answer
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.own_metric import OwnMetric
from lorakeet.evaluate.replies import Replies
from lorakeet.evaluate.report.compose import Answered, classification_report, language_report
from lorakeet.evaluate.report.report import Report, render_html
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.values import from_text, to_text

SPEC = EvaluateSpec(resamples=400)


def report_on(references: list[str], adapter: list[str], base: list[str], own: OwnMetric | None = None) -> Report:
    n, known = len(references), tuple(references)
    mine, other = (Replies(name, tuple(texts), known, known=known) for name, texts in (("adapter", adapter), ("base", base)))
    median = median_answer(known, like=other)
    copies = (constant_answer(known, like=other), *([] if median is None else [median]))
    spread = (("adapter", np.linspace(0.9, 1.1, n)), ("base", np.linspace(2.2, 1.8, n)))
    losses = [RowLosses(name, loss, np.ones(n, dtype=np.int64)) for name, loss in spread]
    answered = Answered(tuple(range(n)), mine, other, None, copies, own, n)
    return language_report(
        "t", adapter=losses[0], base=losses[1], texts=references, truths=references, spec=SPEC, answered=answered
    )


def verdicts(report: Report, right: str = "base") -> dict[str, str]:
    return {one.metric: one.verdict for one in report.comparisons if one.right == right}


def test_a_headline_does_not_deny_what_its_table_shows() -> None:
    """No reply matches, but all but one of the words do: "No better answers are shown" stood beside token F1 0.938 and 0.573."""
    references = [f"red cat number{number} sat on a mat" for number in range(40)]
    report = report_on(references, [f"{text} again" for text in references], ["red cat sat, he said to me"] * 40)
    found = verdicts(report)
    assert found["normalised_match"] == "no difference shown" and found["token_f1"] == "better"
    assert report.verdict is not None
    assert "No better answers" not in report.verdict.sentence and "may do as well" not in report.verdict.sentence
    assert " gains +" in report.verdict.sentence
    assert {one.metric for one in report.comparisons} - {"loss"} == set(report.systems[0].metrics) - {
        "empty", "cut_off", "repeats", "refusals", "reply_words", "loss", "perplexity",
    }  # fmt: skip


def test_prices_have_their_error_with_the_median_as_the_floor() -> None:
    generator = np.random.default_rng(0)
    prices = generator.uniform(5, 100, 60).round(2)
    near, far = prices + generator.normal(0, 1, 60), generator.permutation(prices)
    written = [[f"{price:.2f} €".replace(".", ",") for price in side] for side in (prices, near, far)]
    report = report_on(written[0], written[1], written[2])
    assert report.comparisons[0].metric == "absolute_error"
    assert verdicts(report) == {
        "absolute_error": "better", "numeric_match": "no difference shown", "rank_correlation": "better",
        "exact_match": "no difference shown", "normalised_match": "no difference shown", "loss": "better",
    }  # fmt: skip
    floor = next(system for system in report.systems if system.name == MEDIAN)
    value = floor.metrics["absolute_error"].value
    assert value == pytest.approx(np.abs(prices - np.sort(prices)[29]).mean()) and floor.metrics["rank_correlation"].value == 0
    assert report.verdict is not None and "the median training answer" in report.verdict.sentence
    assert "decimal mark ','" in report.reading and report.reading in render_html(report).replace("&#39;", "'")
    assert from_text(Report, to_text(report), where="report").reading == report.reading


def test_an_own_metric_decides_beside_what_the_references_ask_for() -> None:
    stars = ["1", "2", "3", "4", "5"] * 8
    report = report_on(stars, stars, stars, OwnMetric("my.py:mine", lambda reply, reference: float(len(reply))))
    assert report.comparisons[0].metric == "my.py:mine" and "mean_distance" in report.systems[0].metrics


def test_ordered_labels_have_their_distance_too() -> None:
    generator = np.random.default_rng(2)
    truth, labels = generator.integers(0, 5, 80), ("1", "2", "3", "4", "5")
    near = np.eye(5)[np.clip(truth + generator.integers(-1, 2, 80), 0, 4)]
    sides = [
        answers_from_probabilities(name, 0.9 * table + 0.02, labels=labels, truth=truth)
        for name, table in (("adapter", near), ("base", np.eye(5)[4 - truth]))
    ]
    report = classification_report("t", adapter=sides[0], base=sides[1], texts=["x"] * 80, spec=SPEC)
    found = report.systems[0].metrics
    expected = np.abs(np.asarray(near.argmax(axis=1)) - truth)
    assert found["mean_distance"].value == expected.mean() and found["quadratic_kappa"].value > 0.7
    assert verdicts(report)["mean_distance"] == verdicts(report)["quadratic_kappa"] == "better"
    assert "1, 2, 3, 4, 5" in report.reading
    declared = EvaluateSpec(resamples=400, scale=("5", "4", "1", "2", "3"))
    other = classification_report("t", adapter=sides[0], base=sides[1], texts=["x"] * 80, spec=declared)
    assert other.systems[0].metrics["mean_distance"].value != expected.mean()
    lacking = EvaluateSpec(resamples=400, scale=("1", "2", "3"))
    without = classification_report("t", adapter=sides[0], base=sides[1], texts=["x"] * 80, spec=lacking)
    assert "mean_distance" not in without.systems[0].metrics and any("'4', '5'" in line for line in without.warnings)


@pytest.mark.parametrize("seed", range(12))
def test_a_headline_begins_with_the_labels_that_are_never_right(seed: int) -> None:
    """The quickstart's adapter had none of 36 neutral rows right, under "beats its base by +11 points"."""
    generator = np.random.default_rng(seed)
    labels = tuple(f"label {letter}" for letter in "abcdef"[: generator.integers(2, 7)])
    counts = generator.integers(1, 60, len(labels))
    truth = np.repeat(np.arange(len(labels)), counts)
    lost = generator.random(len(labels)) < 0.4
    said = np.where(lost[truth] | (generator.random(len(truth)) < 0.1), (truth + 1) % len(labels), truth)
    shown = [
        answers_from_probabilities(name, np.eye(len(labels))[answers] * 0.8 + 0.2 / len(labels), labels=labels, truth=truth)
        for name, answers in (("adapter", said), ("base", generator.integers(0, len(labels), len(truth))))
    ]
    report = classification_report("t", adapter=shown[0], base=shown[1], texts=[""] * len(truth), spec=SPEC)
    assert report.verdict is not None
    first = report.verdict.sentence.partition(". ")[0]
    never = [place for place, label in enumerate(labels) if counts[place] >= 5 and not (said == truth)[truth == place].any()]
    assert (first.startswith("The adapter has none of the") and report.verdict.tone != "better") is bool(never)
    most = sorted(never, key=lambda place: -counts[place])[:3]
    assert all(f"none of the {counts[place]} rows of '{labels[place]}'" in first for place in most)
    assert all(f"'{label}'" not in first for place, label in enumerate(labels) if place not in never)

"""The words of what is measured on preferences: a report has them before its other metrics."""

from __future__ import annotations

from lorakeet.evaluate.wording import all_metric_words, metric_words
from lorakeet.kinds.preference.wording import LEAD, LIKELIER, METRICS, PREFERRED


def test_a_report_has_them_first_and_shares_are_in_percent() -> None:
    assert list(all_metric_words())[: len(METRICS)] == list(METRICS)
    assert metric_words(PREFERRED).level(0.5) == "50.0 %" and metric_words(LEAD).level(0.5) == "0.500"
    assert not metric_words(LIKELIER).of_answers and metric_words("accuracy").of_answers

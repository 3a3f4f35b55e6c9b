from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers, answers_from_probabilities
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.report.text import classification_report, language_report
from lorakeet.evaluate.spec import EvaluateSpec

QUICK = EvaluateSpec(resamples=200, show_rows=12)


def test_sections_of_a_classification(report: Report) -> None:
    assert [system.role for system in report.systems] == ["adapter", "base", "floor", "floor"]
    assert [(one.right, one.metric) for one in report.comparisons[:3]] == [
        ("base", m) for m in ("accuracy", "macro_f1", "log_loss")
    ]
    assert {one.right for one in report.comparisons} == {"base", "TF-IDF + logistic regression"}
    assert [matrix.system for matrix in report.confusions] == ["base", "adapter"]
    assert len(report.rows) == 24 and report.rows_of == 379
    assert set(Counter(row.outcome for row in report.rows).values()) == {6}
    assert report.verdict is not None and report.verdict.sentence.startswith("The adapter beats its base by +")


def test_rows_keep_text_truth_and_replies_together() -> None:
    truth = np.array([0, 1, 0, 1])
    table = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])

    def system(name: str, flip: bool) -> Answers:
        return answers_from_probabilities(name, table[:, ::-1] if flip else table, labels=("x", "y"), truth=truth)

    found = classification_report(
        "t",
        adapter=system("adapter", False),
        base=system("base", True),
        texts=["0", "1", "2", "3"],
        sources=list("abcd"),
        spec=QUICK,
    )
    rows = {row.text: row for row in found.rows}
    assert set(rows) == {"0", "1", "2", "3"}
    assert (rows["0"].truth, rows["0"].adapter.text, rows["0"].adapter.probability, rows["0"].outcome) == ("x", "x", 0.9, "fixed")
    assert (rows["1"].truth, rows["1"].base.text, rows["1"].outcome, rows["1"].source) == ("y", "y", "broke", "b")


def test_language_shows_the_largest_changes_of_either_sign() -> None:
    tokens, base = np.full(40, 10), np.full(40, 20.0)
    adapter = base + np.linspace(-5, 5, 40)
    found = language_report(
        "t",
        adapter=RowLosses("adapter", adapter, tokens),
        base=RowLosses("base", base, tokens),
        texts=[str(row) for row in range(40)],
        truths=[""] * 40,
        spec=QUICK,
    )
    assert [row.text for row in found.rows] == [str(row) for row in [*range(6), *range(34, 40)]]
    assert found.rows[0].adapter.loss == pytest.approx(1.5) and found.rows[0].outcome == ""
    assert found.task == "language" and not found.confusions


def test_texts_must_match_the_answers(report: Report) -> None:
    rows = RowLosses("a", np.ones(2), np.ones(2, dtype=np.int64))
    with pytest.raises(DataError, match="2 answered rows, 1 texts"):
        language_report("t", adapter=rows, base=rows, texts=["x"], truths=["x"], spec=QUICK)

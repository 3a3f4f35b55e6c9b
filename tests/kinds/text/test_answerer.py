"""`kinds.text.answerer`: which answers are marked for review."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakeet.evaluate.calibration import ReliabilityBin
from lorakeet.evaluate.intervals import proportion
from lorakeet.evaluate.report.report import read_report
from lorakeet.kinds.text.answerer import RightShare
from lorakeet.runs.open_adapter import open_adapter


def test_rows_are_marked_for_review_by_what_the_report_measured(finished: Any, tmp_path: Path) -> None:
    """365 rows had one answer each, and 0 were marked, under a verdict of 0 of 26 right: they were sure of it."""
    opened = open_adapter(finished.path)
    report = read_report(opened.run.report)  # type: ignore[union-attr]
    bins = ReliabilityBin(0.99, proportion(0, 13)), ReliabilityBin(0.5, proportion(6, 13))
    wrong = RightShare(proportion(0, 26), bins)
    assert wrong.doubts(0.8) and wrong.doubts(0.8, 0.97) and not wrong.doubts(0.6, 0.55)
    assert not RightShare().doubts(0.8, 0.9)
    measured = RightShare.of(opened)
    [adapter] = [one for one in report.systems if one.role == "adapter"]
    assert measured.right == adapter.metrics["accuracy"] and measured.bins

"""`studio.pairing`: two runs on the same rows, by evaluate's own functions, from whole reports alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lorakeet.config import read_run
from lorakeet.errors import DataError
from lorakeet.evaluate.compare import compare_losses, compare_values
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, write_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.studio.pages import Studio
from lorakeet.studio.pairing import measured_folder, measuring, pair_runs, was_measured, whole_report

SPEC = EvaluateSpec(resamples=500)


def labelled(rights: list[bool], *, first: int = 0, rows_of: int | None = None) -> Report:
    rows = [
        SideBySide(f"text {number}", "yes", ScoredAnswer("no", right=False), ScoredAnswer("yes" if right else "no", right=right))
        for number, right in enumerate(rights, first)
    ]
    return Report("x", rows=tuple(rows), rows_of=len(rows) if rows_of is None else rows_of)


def scored(losses: list[float]) -> Report:
    rows = [SideBySide("same text", "t", ScoredAnswer(loss=9.0), ScoredAnswer(loss=loss)) for loss in losses]
    return Report("x", task="language", rows=tuple(rows), rows_of=len(rows))


def test_labelled_rows_are_compared_as_evaluate_compares_values() -> None:
    mine, other = [True] * 20 + [False] * 4, [True] * 8 + [False] * 16
    found = pair_runs(("a", labelled(mine)), ("b", labelled(other)), SPEC)
    values = np.array(mine, dtype=float), np.array(other, dtype=float)
    assert found.comparison == compare_values(("a", "b"), "accuracy", values, SPEC)
    assert found.comparison.verdict == "better" and found.comparison.paired is not None and found.only == (0, 0)
    assert len(found.rows) == 12 and all(row.left.right and not row.right.right for row in found.rows)


def test_other_rows_are_compared_by_their_losses_also_where_texts_occur_twice() -> None:
    mine, other = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.5, 2.0, 3.5, 4.5, 5.5, 6.5, 9.0]
    found = pair_runs(("a", scored(mine)), ("b", scored(other)), SPEC)
    ones = np.ones(7, dtype=np.int64)
    assert found.comparison == compare_losses(RowLosses("a", np.array(mine), ones), RowLosses("b", np.array(other), ones), SPEC)
    assert found.rows[0].left.loss == 7.0 and len(found.rows) == 6


def test_only_common_rows_count_and_none_is_said() -> None:
    found = pair_runs(("a", labelled([True] * 10)), ("b", labelled([False] * 10, first=4)), SPEC)
    assert found.comparison.difference.n == 6 and found.only == (4, 4)
    with pytest.raises(DataError, match="none is in both"):
        pair_runs(("a", labelled([True] * 3)), ("b", labelled([True] * 3, first=9)), SPEC)
    with pytest.raises(DataError, match="measured in different ways"):
        other = Report("x", rows=(SideBySide("text 0", "yes", ScoredAnswer(), ScoredAnswer()),))
        pair_runs(("a", labelled([True])), ("b", other))


def test_a_report_that_lists_a_choice_of_its_rows_does_not_count(studio: Studio) -> None:
    folder = studio.places.runs / "mine"
    folder.mkdir()
    with pytest.raises(DataError, match="no adapter yet"):
        whole_report(studio.places, "mine")
    (folder / "adapter").mkdir()
    write_report(labelled([True] * 5, rows_of=100), folder)
    assert whole_report(studio.places, "mine") is None
    write_report(labelled([True] * 5), measured_folder(studio.places, "mine"))
    assert whole_report(studio.places, "mine") == labelled([True] * 5)


def test_what_is_missing_is_measured_by_a_command(studio: Studio, tmp_path: Path) -> None:
    folder = studio.places.runs / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: m\ndata: r\nlora: {rank: 3}\n")
    words, file = measuring(studio.places, "mine")
    assert words[:3] == ["evaluate", str(folder), "--config"] and words[-1] == str(measured_folder(studio.places, "mine"))
    (tmp_path / "run.yaml").write_text(file)
    config = read_run(tmp_path / "run.yaml")
    assert config.lora.rank == 3 and config.evaluate.show_rows > 1e6 and config.evaluate.answers == 0


def test_a_report_of_earlier_weights_does_not_count(studio: Studio) -> None:
    folder = studio.places.runs / "mine"
    (folder / "adapter").mkdir(parents=True)
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.touch()
    os.utime(weights, (1.0, 1.0))
    write_report(labelled([True] * 5), folder)
    assert whole_report(studio.places, "mine") is not None
    before = measured_folder(studio.places, "mine")
    os.utime(weights, (9e9, 9e9))  # written over: the folder's own time stays
    assert whole_report(studio.places, "mine") is None and measured_folder(studio.places, "mine") != before
    write_report(labelled([True] * 5), measured_folder(studio.places, "mine"))
    assert whole_report(studio.places, "mine") is not None and was_measured(studio.places, "mine")

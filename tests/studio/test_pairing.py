"""`studio.pairing`: two runs on the same rows, by evaluate's own functions, from whole reports alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lorakeet.config import read_run
from lorakeet.errors import DataError
from lorakeet.evaluate.answers import answers_from_probabilities
from lorakeet.evaluate.compare import compare_answers, compare_losses, compare_values
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.compose import classification_report, language_report
from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, write_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.studio.pages import Studio
from lorakeet.studio.pairing import forget_measured, measured_folder, measuring, pair_runs, was_measured, whole_report

SPEC = EvaluateSpec(resamples=500)


def test_two_reports_say_what_one_of_both_would_say() -> None:
    """Tokens and groups of rows are those of the reports: a difference of means over rows has another value and interval."""
    chance = np.random.default_rng(0)
    tokens = chance.integers(1, 60, 40)
    groups = tuple(f"patient {row // 4}" for row in range(40))
    base, mine, other = (RowLosses(name, chance.gamma(2.0, 1.0, 40) * tokens, tokens, groups) for name in ("base", "a", "b"))
    texts = [f"text {row}" for row in range(40)]
    reports = [
        language_report("x", adapter=one, base=base, texts=texts, truths=texts, spec=EvaluateSpec(show_rows=10**6))
        for one in (mine, other)
    ]
    found = pair_runs(("a", reports[0]), ("b", reports[1]), SPEC)
    expected = compare_losses(mine, other, SPEC)
    for name in ("value", "low", "high"):
        assert getattr(found.comparison.difference, name) == pytest.approx(getattr(expected.difference, name), rel=1e-9)
    assert found.comparison.p_value == expected.p_value and found.comparison.difference.n == expected.difference.n
    assert not found.older
    ones = np.ones(40, dtype=np.int64)
    alike = compare_losses(*(RowLosses(one.system, one.losses / tokens, ones) for one in (mine, other)), SPEC)
    assert abs(alike.difference.value - expected.difference.value) > 1e-3


def test_right_answers_are_compared_with_the_groups_of_the_report() -> None:
    chance = np.random.default_rng(1)
    groups = tuple(f"author {row // 5}" for row in range(40))
    answers = [
        answers_from_probabilities(name, chance.dirichlet((1, 1), 40), labels=("n", "y"), truth=np.arange(40) % 2, groups=groups)
        for name in ("base", "a", "b")
    ]
    texts = [f"text {row}" for row in range(40)]
    spec = EvaluateSpec(show_rows=10**6, resamples=200)
    reports = [classification_report("x", adapter=one, base=answers[0], texts=texts, spec=spec) for one in answers[1:]]
    found = pair_runs(("a", reports[0]), ("b", reports[1]), spec)
    (expected, *_) = compare_answers(answers[1], answers[2], spec)
    assert found.comparison.paired == expected.paired and found.comparison.test == expected.test
    for name in ("value", "low", "high"):
        assert getattr(found.comparison.difference, name) == pytest.approx(getattr(expected.difference, name))


def test_reports_of_earlier_versions_are_compared_row_by_row_and_say_so() -> None:
    found = pair_runs(("a", scored([1.0] * 7)), ("b", scored([2.0] * 7)), SPEC)
    assert found.older and found.comparison.difference.value == -1.0


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


def test_what_was_measured_of_a_run_that_is_gone_is_removed(studio: Studio) -> None:
    for name in ("gone", "mine", "deleted"):
        write_report(labelled([True]), studio.places.own / "measured" / f"{name}-ab12")
    (studio.places.runs / "mine").mkdir()
    (studio.places.own / "deleted" / "deleted@1").mkdir(parents=True)
    forget_measured(studio.places)
    assert sorted(path.name for path in (studio.places.own / "measured").iterdir()) == ["deleted-ab12", "mine-ab12"]

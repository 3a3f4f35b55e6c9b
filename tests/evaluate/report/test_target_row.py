"""A row of the table of targets in words, before and after training."""

from __future__ import annotations

from lorakeet.evaluate.report.report import Report, render_html
from lorakeet.evaluate.report.target_row import ExpertTokens, TargetRow
from lorakeet.evaluate.values import from_text, to_text


def test_a_row_says_only_what_is_worth_a_word() -> None:
    assert TargetRow("attention", 1200, 1200).cells() == ("attention", "1,200", "1,200", "")
    assert TargetRow("attention", 8, 8, moved=8, moved_a=8).cells() == ("attention", "8", "8", "8", "")
    head = TargetRow("head", 1, left={"the head, adapted by name only": 1})
    assert head.cells() == ("head", "1", "0", "the head, adapted by name only")
    assert TargetRow("head", 1, moved=0, moved_a=0, left={"a": 1}).cells() == ("head", "1", "0", "", "a")


def test_more_than_one_reason_and_a_that_did_not_move_are_counted() -> None:
    row = TargetRow("attention", 9, 4, 1, left={"x": 3, "y": 1}, moved=4, moved_a=2)
    assert row.remarks == "1 trained whole; 3: x; 1: y; A of 2 moved"


def test_experts_are_counted_before_training_and_their_tokens_after() -> None:
    row = TargetRow("experts", 4, 4, experts=16)
    assert row.remarks == "16 experts"
    tokens = ExpertTokens(16, 3, 0, 120, 2048)
    after = TargetRow("experts", 4, 4, experts=16, moved=4, moved_a=4, tokens=tokens)
    assert after.remarks == "13 of 16 experts saw tokens: 0 to 2,048 each, median 120"


def test_a_report_holds_the_rows_in_json_and_on_its_page() -> None:
    rows = (TargetRow("head", 1, left={"<b>": 1}), TargetRow("attention", 8, 8, moved=7, moved_a=8))
    report = Report("a run", targets=rows)
    assert from_text(Report, to_text(report), where="x") == report
    assert "What was trained" not in render_html(Report("a run"))
    page = render_html(report)
    assert "What was trained" in page and "&lt;b&gt;" in page and "A of 8 moved" in page
    assert "Moved" not in render_html(Report("a run", targets=rows[:1]))

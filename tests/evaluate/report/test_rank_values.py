"""`evaluate.rank_values`: the map, and the drawing of the curve."""

from __future__ import annotations

from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report.rank_values import CurvePoint, RankCell, RankCurve, RankMap, Search, TrialResult, curve_plot
from lorakeet.evaluate.report.report import Report, render_html
from lorakeet.evaluate.values import from_text, to_text


def point(name: str, parameters: int, gain: float) -> CurvePoint:
    return CurvePoint(name, parameters, Estimate(gain, gain - 0.1, gain + 0.1, 50, "BCa bootstrap", seed=0))


CURVE = RankCurve((point("as trained", 4000, 0.9), point("rank <2>", 1000, 0.8)), "shows no loss", "rank <2>")


def test_the_map_knows_its_rows_and_columns() -> None:
    ranks = RankMap((RankCell("0", "q", 4), RankCell("0", "up", 2), RankCell("1", "q", 8)))
    assert (ranks.layers, ranks.matrices, ranks.highest) == (("0", "1"), ("q", "up"), 8)
    assert ranks.rank("1", "q") == 8 and ranks.rank("1", "up") == 0


def test_the_curve_has_a_dot_for_each_point_and_marks_one() -> None:
    drawing = curve_plot(CURVE)
    assert drawing.count("<circle") == 2 and drawing.count("kept") == 1 and drawing.count("whisker held") == 2


def test_the_sections_are_on_the_page_with_their_data_escaped() -> None:
    trial = TrialResult("trial 1", "rate <1e-3>", 5, 100, "diverged at step 5", True)
    search = Search((trial,), 50, "Differences below 0.1 cannot be seen.", conclusion="No difference shown.")
    ranks = RankMap((RankCell("0", "q", 4), RankCell("", "<head>", 8)))
    report = Report("A run", ranks=ranks, rank_curve=CURVE, search=search)
    page = render_html(report)
    marked = "Marked: rank &lt;2&gt;, the smallest adapter, from the largest down, that shows no loss"
    for words in ("&lt;head&gt;", "rate &lt;1e-3&gt;", marked, "Differences below 0.1"):
        assert words in page, words
    assert page.count("<head>") == 1 and "diverged" in page
    assert from_text(Report, to_text(report), where="here") == report

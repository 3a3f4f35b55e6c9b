"""The report, on text and on images: tables, charts, rank curve, samples, on the page and in JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers, answers_from_probabilities
from lorakeet.evaluate.baselines import majority_class
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report import charts
from lorakeet.evaluate.report.charts import ChartPoint, Curves
from lorakeet.evaluate.report.compose import (
    classification_report,
    language_report,
)
from lorakeet.evaluate.report.rank_values import CurvePoint, RankCell, RankCurve, RankMap, Search, TrialResult
from lorakeet.evaluate.report.report import (
    Command,
    Leak,
    Report,
    ScoredAnswer,
    SideBySide,
    read_report,
    render_html,
    write_report,
)
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.values import from_text, to_text

VOID = {"meta", "link", "br", "hr", "img", "input", "circle", "line", "polyline"}
EVIL = "<script>alert(1)</script>\"><img src=x onerror=alert(2)> & '{{ 7 * 7 }}'"


class Page(HTMLParser):
    """Tags, attributes and text of a page; `open` must end empty."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_written_and_read_again(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(report)
    with pytest.raises(DataError, match=r"has no absent\.json: a run has its report when it has ended"):
        read_report(tmp_path / "absent.json")


def test_page_is_well_formed_and_self_contained(report: Report) -> None:
    source = render_html(report)
    page = Page(source)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "srcset", "action"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", source)
    policies = [
        attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies and str(policies[0]).startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in source and "@media print" in source and "@media (max-width" in source


def test_page_is_accessible(report: Report) -> None:
    page = Page(render_html(report))
    assert page.count("h1") == 1
    assert page.count("table") == page.count("caption")
    identities = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    named = [attributes["aria-labelledby"] for tag, attributes in page.tags if tag == "section"]
    assert named and set(named) <= identities and len(identities) == len(named)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert all(
        attributes.get("aria-hidden") == "true" or "viewbox" in attributes for tag, attributes in page.tags if tag == "svg"
    )


def test_page_says_what_was_measured(report: Report) -> None:
    text = Page(render_html(report)).text
    assert report.verdict is not None
    for phrase in report.verdict.phrases:
        assert phrase.text in text and phrase.interval in text
    for words in (
        "certificate passed",
        "1 leaked pair of rows found",
        "379 held-out rows",
        "drugsComTrain.tsv:402",
        "498 tokens/s",
        "1.60 GiB",
        "lorakeet merge runs/drug-reviews --out merged",
        "step 48",
        "adapter fixed",
        "McNemar",
    ):
        assert words in text, words


def test_leaks_are_counted_by_kind_and_shown_side_by_side_with_how_they_were_searched(report: Report) -> None:
    near = [
        Leak(f"held:{n}", f"train:{n}", 0.9, "dropped", f"first text {n}", "near-copy", f"other text {n}") for n in range(120)
    ]
    copies = (Leak("held:x", "train:x", 1.0, "dropped", "an equal text", "exact copy", "an equal text"),)
    text = Page(render_html(replace(report, leaks=(*copies, *near), leak_search="Searched 600 rows by words."))).text
    all_dropped = "121 leaked pairs of rows found, all dropped"
    for words in (all_dropped, "120 × near-copy", "1 × exact copy", "first text 0", "other text 0"):
        assert words in text, words
    some, every = ([replace(leak, action="kept") for leak in found] for found in (near[:2], near))
    assert "120 leaked pairs of rows found, 2 kept" in Page(render_html(replace(report, leaks=(*some, *near[2:])))).text
    assert "120 leaked pairs of rows found, all kept" in Page(render_html(replace(report, leaks=tuple(every)))).text
    assert text.count("an equal text") == 1 and "Searched 600 rows by words." in text
    assert "The first 100 rows found in both parts; report.json has all" in text and "train:98" in text and "train:99" not in text


def test_filters_have_what_they_filter(report: Report) -> None:
    page = Page(render_html(report))
    outcomes = {attributes["data-outcome"] for tag, attributes in page.tags if tag == "article"}
    offered = {attributes["data-outcome"] for tag, attributes in page.tags if tag == "button" and attributes.get("data-outcome")}
    assert outcomes == offered == {"fixed", "broke", "both-right", "both-wrong"}
    labels = {attributes["data-label"] for tag, attributes in page.tags if tag == "article"}
    assert labels == {attributes["value"] for tag, attributes in page.tags if tag == "option" and attributes["value"]}


def test_hostile_data_stays_text(report: Report) -> None:
    row = SideBySide(EVIL, EVIL, ScoredAnswer(EVIL, 0.5, True), ScoredAnswer(EVIL, 0.5, False), EVIL)
    renamed = tuple(replace(system, name=EVIL, note=EVIL) for system in report.systems)
    hostile = replace(
        report,
        title=EVIL,
        subtitle=EVIL,
        facts={EVIL: EVIL},
        speed={EVIL: EVIL},
        rows=(row,),
        systems=renamed,
        warnings=(EVIL,),
        leaks=(Leak(EVIL, EVIL, 1.0, EVIL, EVIL, EVIL, f"{EVIL}!"),),
        leak_search=EVIL,
        next_commands=(Command(EVIL, EVIL),),
        comparisons=tuple(replace(one, left=EVIL, right=EVIL) for one in report.comparisons),
        confusions=tuple(replace(matrix, system=EVIL, labels=(EVIL, "b", "c")) for matrix in report.confusions),
        reliabilities=tuple(replace(curve, system=EVIL) for curve in report.reliabilities),
        certificate=Certificate(
            EVIL, (tolerance_check(EVIL, {EVIL: 1.0}, tolerance={EVIL: 0.5}, between=(EVIL, EVIL), detail=EVIL),), {EVIL: EVIL}
        ),
    )
    page = Page(render_html(hostile))
    assert page.open == [] and page.count("script") == 1 and page.count("img") == 0
    assert "alert(1)" in page.text and "{{ 7 * 7 }}" in page.text and "49" not in re.findall(r"'(\d+)'", page.text)
    assert not any("onerror" in attributes for _, attributes in page.tags)


def test_a_language_report_has_losses_and_no_labels(language: Report) -> None:
    page = Page(render_html(language))
    assert page.open == []
    assert "Perplexity" in page.text and "nats" in page.text and "Confusion" not in page.text and "Row by row" not in page.text
    assert page.count("select") == 0


@pytest.mark.parametrize("section", [field.name for field in fields(Report) if field.name not in ("title", "task")])
def test_any_section_may_be_missing(report: Report, section: str) -> None:
    page = Page(render_html(replace(report, **{section: getattr(Report("x"), section)})))
    assert page.open == [] and "None" not in page.text


def test_nothing_at_all_still_is_a_page() -> None:
    page = Page(render_html(Report("An empty run")))
    assert page.open == [] and "Nothing was compared in this run." in page.text and page.count("section") == 0


def test_odd_values_are_drawn() -> None:
    odd = Curves(train=(ChartPoint(1, math.nan), ChartPoint(2, 3.0)), held_out=(ChartPoint(2, math.inf, 1.0, 2.0),), best_step=7)
    wide = Estimate(1.0, 0.541, 1.0, 838, "unseen share over 6 groups")
    check = tolerance_check("x", {"logit": math.nan}, tolerance={"logit": 1.0}, between=("a", "b"))
    failed = Certificate("merged", (replace(check, estimates={"logit": wide}),))
    page = Page(render_html(replace(Report("odd"), curves=odd, certificate=failed, leaks=())))
    assert page.open == [] and "certificate failed" in page.text and "outside" in page.text
    assert "unseen share over 6 groups" in page.text, "an interval says by how many texts it is so wide"
    assert "no leaked pairs of rows found" in page.text


def point(name: str, parameters: int, gain: float) -> CurvePoint:
    return CurvePoint(name, parameters, Estimate(gain, gain - 0.1, gain + 0.1, 50, "BCa bootstrap", seed=0))


CURVE = RankCurve((point("as trained", 4000, 0.9), point("rank <2>", 1000, 0.8)), "shows no loss", "nats a token", "rank <2>")


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


@pytest.mark.parametrize(
    "values", [[0.6, 0.93], [0.0], [-0.6, 0.02], [3.0, 3.0], [1e-9, 2e-9], [], [math.inf, 1.0], [12.0, 4000.0]]
)
def test_axis_holds_its_values_and_has_round_distinct_ticks(values: list[float]) -> None:
    scale = charts.axis(values)
    assert all(scale.low <= value <= scale.high for value in values if math.isfinite(value))
    labels = [scale.label(tick) for tick in scale.ticks]
    assert 1 <= len(labels) <= 7 and len(set(labels)) == len(labels)
    assert all(0 <= scale.at(value) <= 100 for value in [*values, scale.low - 1, math.nan])


def test_the_kept_checkpoint_is_marked_and_a_lone_point_survives() -> None:
    points = tuple(ChartPoint(step, 1 / (step + 1), 0.0, 1.0) for step in range(0, 50, 10))
    drawing = charts.learning_curves(Curves(train=points, held_out=points, learning_rate=points, best_step=20))
    assert drawing.count("kept") == 1 and drawing.count('class="best"') == 1
    assert "polyline" not in charts.learning_curves(Curves(held_out=(ChartPoint(1, math.nan),)))


def test_no_coordinate_is_nan() -> None:
    points = (ChartPoint(0, math.nan), ChartPoint(1, math.inf), ChartPoint(2, 1.0), ChartPoint(3, 0.5))
    drawing = charts.learning_curves(Curves(train=points, held_out=points))
    assert not re.search(r"nan|inf", drawing)


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


def test_suspect_labels_are_listed_with_their_rows() -> None:
    truth = np.arange(60) % 2
    said = np.where(np.arange(60) % 20 == 0, 1 - truth, truth)
    table = np.full((60, 2), 0.05)
    table[np.arange(60), said] = 0.95
    names = ("adapter", "base", "majority class", "TF-IDF")
    systems = [answers_from_probabilities(name, table, labels=("x", "y"), truth=truth) for name in names]
    texts = [f"row number {number}" for number in range(60)]
    found = classification_report(
        "t", adapter=systems[0], base=systems[1], floors=systems[2:], texts=texts, sources=texts, spec=QUICK
    )
    assert {one.text for one in found.suspects} == {"row number 0", "row number 20", "row number 40"}
    text = Page(render_html(found)).text
    assert "both contradict the label of 3" in text and "row number 40" in text and "training rows were not checked" in text
    none = Page(render_html(replace(found, suspects=()))).text
    assert "Suspect labels No suspect is among the held-out rows" in " ".join(none.split()), "silence would read as clean labels"
    assert "training rows were not checked" in none
    assert "Suspect labels" not in Page(render_html(replace(found, suspects=(), systems=found.systems[:2]))).text, "not searched"


def test_a_pipe_in_place_of_a_report_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(DataError, match="Cannot read the report"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("floors", [True, False])
def test_one_label_with_nearly_all_rows_is_compared_with_the_majority_class(floors: bool) -> None:
    """ "+0.732 accuracy" over a base found none of 3 frauds: no more than always saying "ok"."""
    labels, truth = ("ok", "fraud"), np.array([0] * 57 + [1] * 3)
    shy = np.where(np.arange(60) < 44, 1, 0)
    adapter, base = (
        answers_from_probabilities(name, np.eye(2)[said] * 0.9 + 0.05, labels=labels, truth=truth)
        for name, said in (("adapter", np.zeros(60, int)), ("base", shy))
    )
    known = ["ok"] * 95 + ["fraud"] * 5
    given = [majority_class(known, [labels[one] for one in truth], labels=labels)] if floors else []
    found = classification_report("t", adapter=adapter, base=base, floors=given, texts=["x"] * 60, spec=QUICK)
    against = {one.right: one.verdict for one in found.comparisons if one.metric == "accuracy"}
    assert against == {"base": "better", "majority class": "no difference shown"}
    said = found.verdict.sentence if found.verdict else ""
    assert found.verdict is not None and found.verdict.tone == "mixed" and "majority class" in said
    assert "It finds 0 of 3 rows of 'fraud': recall 0.0 % (0.0 to 56.1 %), balanced accuracy 50.0 % (" in said
    assert found.systems[0].metrics["balanced_accuracy"].value == 0.5 and not found.suspects

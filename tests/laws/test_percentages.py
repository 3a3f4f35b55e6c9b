"""Shares have one base for each audience: values, settings and JSON are from 0 to 1; what people read is in percent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from markupsafe import Markup
from rich.console import Console

pytest.importorskip("starlette", reason="starlette, of the extra lorakeet[studio], serves the pages")

from starlette.testclient import TestClient

from lorakeet.api.run import ShownReport
from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.intervals import Estimate, proportion
from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, SystemResult, read_report, render_html, write_report
from lorakeet.evaluate.verdict import verdict_of
from lorakeet.evaluate.wording import all_metric_words
from lorakeet.exporting.card import CardFacts, card
from lorakeet.kinds.terminal import show_results
from lorakeet.runs.remarks import few_rows_note
from lorakeet.studio.app import make_studio, studio_app
from lorakeet.studio.places import Places
from structure.tree import SOURCE

METRIC_WORDS = all_metric_words()
SHARES = sorted(name for name, words in METRIC_WORDS.items() if words.share)
RIGHT, BASE = proportion(13, 16), proportion(4, 16)  # 0.8125 and 0.25, 57.0 to 93.4 %
GAIN = Estimate(0.5625, 0.25, 0.75, 16, "McNemar")


def report_with(metric: str) -> Report:
    compared = Comparison("adapter", "base", metric, GAIN, 0.01, "McNemar", METRIC_WORDS[metric].higher_is_better, "better")
    said = SideBySide("a", "yes", ScoredAnswer("no", 0.25, False), ScoredAnswer("yes", 0.8125, True), "rows.csv:2")
    systems = SystemResult("base", "base", {metric: BASE}), SystemResult("adapter", "adapter", {metric: RIGHT})
    verdict = verdict_of([compared])
    return Report("r", systems=systems, comparisons=(compared,), verdict=verdict, rows=(said,), rows_of=16, task="classification")


def shown_to_people(report: Report, place: Path) -> dict[str, str]:
    """What the page, the terminal, the model card and the studio say of it."""
    studio = make_studio(Places.of(place / "runs", ()))
    folder = studio.places.runs / "r"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"model": "package:tiny", "data": "rows.csv"}))
    write_report(report, folder)
    console = Console(width=400, file=StringIO())
    show_results(report, console)
    with TestClient(studio_app(studio), base_url="http://127.0.0.1:8017") as browser:
        browser.get(f"/?token={studio.token}")
        page = browser.get("/result/r").text
    return {
        "report": Markup(render_html(report).partition("</style>")[2].partition("<footer>")[0]).striptags(),
        "terminal": console.file.getvalue(), "card": card(CardFacts("a", "b", {}, ["c"]), report, None),
        "studio": Markup(page.partition("<main")[2]).striptags(),
    }  # fmt: skip


@pytest.mark.parametrize("metric", SHARES)
def test_people_read_percent_and_points_and_programs_shares(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    report = report_with(metric)
    for where, text in shown_to_people(report, tmp_path).items():
        assert not re.search(r"0\.8125?\b|0\.562|0\.25\b", text), (where, metric)
        if METRIC_WORDS[metric].drawn or where in ("report", "card"):  # others have no column
            assert re.search(r"81\.2[0-9]? %", text), (where, metric)
            assert re.search(r"\+56\.2[0-9]? points", text), (where, metric)
    assert read_report(tmp_path / "runs" / "r" / "report.json").systems[1].metrics[metric].value == 0.8125
    assert getattr(ShownReport(report).adapter, metric).value == 0.8125
    assert str(ShownReport(report).adapter) == f"adapter: {metric} 0.812 [0.570, 0.934] n=16"


def test_what_is_no_share_is_written_as_it_is() -> None:
    words = METRIC_WORDS["log_loss"]
    assert (words.level(0.25), words.change(-0.25)) == ("0.250", "−0.250") and words.said(0.5) == "+0.500 log-loss"
    missing = replace(GAIN, why_none="too few rows")
    assert METRIC_WORDS["accuracy"].ends(missing, signs=True) == "too few rows"
    assert "with 13 of 16 right, the accuracy is 81.2 % and its 95 % interval 57.0 to 93.4 %" in few_rows_note(16, labelled=True)


def test_one_function_writes_percents() -> None:
    """Others wrote "81.2%" here, "0.81" there and "81 %" elsewhere of one number."""
    other = re.compile(r"\{[^{}]*:[^{}]*%\}|100 \* [^\n]*\} %|\* 100[^\n]*%\"")
    found = {
        f"{path.relative_to(SOURCE)}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if other.search(line) and path.name != "errors.py"
    }
    assert not {line for line in found if "compress.py" not in line and "verdict.py" not in line}, found

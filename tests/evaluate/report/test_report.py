from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.report.report import (
    ChartPoint,
    Command,
    Curves,
    Leak,
    Report,
    ScoredAnswer,
    SideBySide,
    read_report,
    render_html,
    write_report,
)

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
    with pytest.raises(DataError, match=r"absent\.json"):
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
        "1 leaked row found",
        "379 held-out rows",
        "drugsComTrain.tsv:402",
        "498 tokens/s",
        "1.60 GiB",
        "lorakeet merge runs/drug-reviews --out merged",
        "step 48",
        "adapter fixed",
        "exact McNemar",
    ):
        assert words in text, words


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
        leaks=(Leak(EVIL, EVIL, 1.0, EVIL, EVIL),),
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


@pytest.mark.parametrize(
    "section",
    [
        "verdict",
        "systems",
        "comparisons",
        "curves",
        "confusions",
        "reliabilities",
        "rows",
        "leaks",
        "drift",
        "memory",
        "speed",
        "certificate",
        "next_commands",
        "facts",
        "memory_budget",
    ],
)
def test_any_section_may_be_missing(report: Report, section: str) -> None:
    page = Page(render_html(replace(report, **{section: getattr(Report("x"), section)})))
    assert page.open == [] and "None" not in page.text


def test_nothing_at_all_still_is_a_page() -> None:
    page = Page(render_html(Report("An empty run")))
    assert page.open == [] and "Nothing was compared in this run." in page.text and page.count("section") == 0


def test_odd_values_are_drawn() -> None:
    odd = Curves(train=(ChartPoint(1, math.nan), ChartPoint(2, 3.0)), held_out=(ChartPoint(2, math.inf, 1.0, 2.0),), best_step=7)
    failed = Certificate("merged", (tolerance_check("x", {"logit": math.nan}, tolerance={"logit": 1.0}, between=("a", "b")),))
    page = Page(render_html(replace(Report("odd"), curves=odd, certificate=failed, leaks=())))
    assert (
        page.open == [] and "certificate failed" in page.text and "outside" in page.text and "no leaked rows found" in page.text
    )


def test_the_page_is_the_same_for_the_same_report(report: Report) -> None:
    assert render_html(report) == render_html(report)

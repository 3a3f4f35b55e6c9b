"""`studio.screens.result`: the verdict, what it does not prove, answers side by side, and the report in its frame."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html import unescape

import pytest
from starlette.testclient import TestClient

from lorakeet.data.split import SPLIT_FORMAT
from lorakeet.errors import Remedy
from lorakeet.evaluate.baselines import CONSTANT, MAJORITY, TFIDF
from lorakeet.evaluate.certificate import Certificate, Unchecked, tolerance_check
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, SystemResult, write_report
from lorakeet.evaluate.verdict import Phrase, Verdict
from lorakeet.studio.pages import Studio
from lorakeet.studio.screens.result import plain_sentences, unproved

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'
CHECK = tolerance_check("adapter on disk", {"mean_kl": 0.5}, tolerance={"mean_kl": 1.0}, between=("a", "b"))
REPORT = Report(
    HOSTILE,
    verdict=Verdict((Phrase("The adapter beats its base by +0.1 accuracy", "95 % interval +0.05 to +0.15"),), "better"),
    rows=(SideBySide(HOSTILE, "yes", ScoredAnswer("no", right=False), ScoredAnswer(HOSTILE, right=True), HOSTILE),),
    rows_of=379,
    certificate=Certificate("run", (CHECK,), unchecked=(Unchecked("adapter/ in PEFT", "logits", "PEFT is not installed"),)),
    warnings=(HOSTILE,),
)


@pytest.fixture
def page(browser: TestClient, studio: Studio) -> str:
    folder = studio.places.runs / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\ndata: r\n")
    write_report(REPORT, folder)
    (folder / "report.html").write_text("<script>a stranger's page</script>")
    assert browser.get("/result").headers["location"] == "/result/mine"
    return browser.get("/result/mine").text


def test_the_verdict_is_one_sentence_with_its_interval(page: str) -> None:
    heading = " ".join(re.sub("<[^>]+>", "", page.partition("<h1>")[2].partition("</h1>")[0]).split())
    assert heading == "The adapter beats its base by +0.1 accuracy (95 % interval +0.05 to +0.15)."


def test_texts_of_rows_are_text(page: str) -> None:
    assert "<script>alert" not in page and "<img src=x" not in page and page.count("&lt;script&gt;alert") >= 3
    assert 'data-outcome="fixed"' in page and "adapter fixed (1)" in page


def test_it_says_what_is_not_proved(page: str) -> None:
    assert "What this does not prove" in page and "about 379 held-out rows" in page
    assert "Not checked: logits of adapter/ in PEFT, since PEFT is not installed." in page
    nothing = replace(REPORT, verdict=Verdict((), "none"), certificate=None)
    assert unproved(nothing)[0].startswith("That there is no difference") and len(unproved(nothing)) == 4


def test_the_report_is_made_from_its_values_and_runs_its_own_script_alone(page: str, browser: TestClient) -> None:
    assert 'sandbox="allow-scripts"' in page
    shown = browser.get("/result/mine/report")
    policy = shown.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'") and "a stranger's page" not in shown.text
    [script] = re.findall(r"<script>(.*?)</script>", shown.text, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert re.search("script-src[^;]*unsafe", policy) is None


def test_a_run_without_a_result_leads_to_its_progress(browser: TestClient, studio: Studio) -> None:
    (studio.places.runs / "young").mkdir()
    assert browser.get("/result/young").headers["location"] == "/run/young"
    assert "No run has finished yet" in browser.get("/result").text
    assert browser.get("/result/gone").status_code == 404 and browser.get("/result/young/report").status_code == 404


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, 16, "Wilson", 0.95)


def test_accuracies_are_said_in_rows_and_a_simple_method_that_is_as_good_is_named() -> None:
    names = (("base", "base", 0.3125), ("adapter", "adapter", 0.9375), (TFIDF, "floor", 1.0), (MAJORITY, "floor", 0.25))
    systems = tuple(SystemResult(name, role, {"accuracy": estimate(value)}) for name, role, value in names)  # type: ignore[arg-type]
    first, second = plain_sentences(replace(REPORT, rows_of=16, systems=systems))
    assert first == "The trained model has 15 of 16 rows right; before training it had 5 of 16."
    assert second == f"{TFIDF} has 16 of 16 right, and needs no such model. For this task it may be all that you need."
    assert plain_sentences(REPORT) == []


@pytest.mark.parametrize("name", ["few-shot base", "uncut adapter"])
def test_what_needs_the_model_is_never_all_that_is_needed(name: str) -> None:
    names = (("base", "base", 0.3125), ("adapter", "adapter", 0.9375), (name, "floor", 1.0))
    systems = tuple(SystemResult(one, role, {"accuracy": estimate(value)}) for one, role, value in names)  # type: ignore[arg-type]
    said = plain_sentences(replace(REPORT, rows_of=16, systems=systems))
    assert said[1:] == [f"The {name} has 16 of 16 right, with the same model."]


def answered(truth: str, reply: str) -> SideBySide:
    base, adapter = (ScoredAnswer(one, right=truth == one) for one in ("b", reply))
    return SideBySide(f"a row of {truth}", truth, base, adapter)


def test_one_answer_to_every_row_is_never_said_to_be_all_that_is_needed() -> None:
    """A newcomer's case: after ten steps the model called every message normal, and the page praised the majority class."""
    systems = tuple(
        SystemResult(one, role, {"accuracy": estimate(value)}, note)  # type: ignore[arg-type]
        for one, role, value, note in (
            ("base", "base", 0.25, ""), ("adapter", "adapter", 0.75, ""), (MAJORITY, "floor", 0.75, "always answers 'a'"),
        )
    )  # fmt: skip
    rows = tuple(answered(truth, "a") for truth in "aaab")
    _, same, majority = plain_sentences(replace(REPORT, rows_of=4, rows=rows, systems=systems))
    assert same == "It gave the same answer to every row: “a”."
    assert majority.startswith("The majority class has 3 of 4 right (it always answers “a”): nothing shows yet that the model")
    constant = replace(systems[2], name=CONSTANT, note="'a', which 3 of 4 have")
    said = plain_sentences(replace(REPORT, rows_of=4, rows=rows, systems=(*systems[:2], constant)))[2]
    assert "3 of 4 right: nothing shows yet" in said
    some = plain_sentences(replace(REPORT, rows_of=4, rows=(*rows[:3], answered("b", "b")), systems=systems))
    assert not any("same answer" in sentence for sentence in some)


def test_labels_that_hardly_any_measured_row_has_are_not_proved(browser: TestClient, studio: Studio) -> None:
    rows = tuple(answered(truth, "a") for truth in "aaaaaab")
    report = replace(REPORT, rows_of=7, rows=rows)
    said = "How it does on labels that few of the 7 measured rows have: “c” (none), “b” (1). More such rows would show it."
    assert unproved(report, ("a", "b", "c"))[0] == said
    assert not any("few of the" in line for line in (*unproved(report, ("a",)), *unproved(replace(report, rows_of=9), ("b",))))
    folder = studio.places.runs / "rare"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\ndata: r\n")
    write_report(report, folder)
    known = json.dumps({"format": SPLIT_FORMAT, "held_out": [], "labels": ["a", "b", "c"]})
    for text, expected in ((known, True), ("[" * 99_999, False)):  # the second one of a stranger
        (folder / "split.json").write_text(text)
        answer = browser.get("/result/rare")
        assert answer.status_code == 200 and (said in unescape(answer.text)) == expected


def test_a_warning_that_advises_a_setting_leads_to_a_run_with_it(browser: TestClient, studio: Studio) -> None:
    folder = studio.places.runs / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\ndata: r\nlora: {rank: 4}\n")
    warning = "To train with their names, set data.template, for instance '{text}\\nOne of: a, b'."
    remedy = Remedy("data.template", "{text}\nOne of: a, b", "Name the labels in the prompt")
    write_report(replace(REPORT, warnings=(warning,), remedies=(remedy,)), folder)
    text = browser.get("/result/mine").text
    assert "Prepare another run: name the labels in the prompt" in text and "One of: a, b”" in text
    assert "data.template=%7Btext%7D%0AOne+of%3A+a%2C+b" in text and "lora.rank=4" in text

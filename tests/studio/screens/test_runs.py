"""`studio.screens.runs`: the table, overlays, comparisons, tags, deleting with undo."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from starlette.testclient import TestClient

from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, write_report
from lorakeet.studio.pages import Studio
from lorakeet.studio.pairing import measured_folder
from lorakeet.studio.screens.runs import age_of, lines_of, sparkline

HOSTILE = '<script>alert("x")</script>'


def made(studio: Studio, name: str, *, model: str = "package:tiny", rights: list[bool] | None = None) -> Path:
    folder = studio.places.runs / name
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"model": model, "data": "rows.jsonl"}))
    lines = [{"step": 0, "held_out_loss": 3.0, "low": 2.0}, {"step": 1, "loss": 2.0}, {"step": 1, "held_out_loss": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rights is not None:
        answers = [ScoredAnswer(HOSTILE, right=right) for right in rights]
        rows = [SideBySide(f"{HOSTILE} {i}", "yes", ScoredAnswer("no"), answer) for i, answer in enumerate(answers)]
        write_report(Report("x", rows=tuple(rows), rows_of=len(rows)), folder)
    return folder


def test_names_models_and_tags_of_strangers_are_text(browser: TestClient, studio: Studio) -> None:
    name = "a <b> & c"
    made(studio, name, model=HOSTILE)
    browser.post("/runs/a%20%3Cb%3E%20&%20c/tags", data={"tags": f"{HOSTILE}, best,, best"})
    text = browser.get("/runs").text
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "a &lt;b&gt; &amp; c" in text
    assert [line.run.tags for line in lines_of(studio)] == [(HOSTILE, "best")]
    assert browser.post("/runs/a%20%3Cb%3E%20&%20c/tags", data={"tags": "x" * 41}).status_code == 400


def test_a_job_without_a_folder_yet_is_in_the_table(browser: TestClient, studio: Studio) -> None:
    studio.queue.add(["finetune"], title="x", run="coming")
    made(studio, "old")
    assert [(line.run.name, line.state) for line in lines_of(studio)] == [("coming", "waiting"), ("old", "stopped")]
    assert 'href="/run/coming"' in browser.get("/runs").text


def test_a_run_that_ended_before_its_first_step_stays_with_a_way_to_start_again(browser: TestClient, studio: Studio) -> None:
    job = studio.queue.add(
        ["finetune", "{folder}/run.yaml"], title="x", run="early", files={"run.yaml": "{model: package:tiny, data: rows.jsonl}"}
    )
    for name, text in (("alive", ""), ("code", "4")):
        (job.folder / name).write_text(text)
    [line] = lines_of(studio)
    assert (line.run.name, line.state, line.run.model, line.run.rows) == ("early", "stopped", "package:tiny", "rows.jsonl")
    assert dict(parse_qsl(line.again)) == {"model.path": "package:tiny", "data.train": "rows.jsonl"} and line.run.problem
    assert 'href="/run?model.path=package%3Atiny&amp;data.train=rows.jsonl"' in browser.get("/runs").text
    browser.post("/runs/early/delete")
    assert lines_of(studio) == [] and not job.folder.exists()


def test_a_verdict_that_is_worse_in_nothing_is_not_called_worse(browser: TestClient, studio: Studio) -> None:
    folder = made(studio, "mine")
    comparisons = [{"metric": "accuracy", "verdict": verdict} for verdict in ("better", "no difference shown")]
    report = {"verdict": {"phrases": [{"text": "It beats its base"}], "tone": "mixed"}, "comparisons": comparisons}
    (folder / "report.json").write_text(json.dumps(report))
    text = browser.get("/runs").text
    assert 'class="pill mixed">better than one, no difference from another shown<' in text
    assert "worse" not in text.replace(str(studio.places.runs), "")


def test_curves_lie_over_each_other(browser: TestClient, studio: Studio) -> None:
    for name in ("a", "b"):
        made(studio, name)
    text = browser.get("/runs/overlay?name=a&name=b&name=a").text
    assert "Held-out loss of 2 runs" in text and "&#34;y&#34;: 1.5" in text
    assert f"cat {studio.places.runs}/a/metrics.jsonl" in text and f"ls -t {studio.places.runs}" in browser.get("/runs").text
    assert browser.get("/runs/overlay").status_code == 400 and browser.get("/runs/overlay?name=gone").status_code == 404


def test_two_runs_are_compared_in_one_sentence_with_an_interval(browser: TestClient, studio: Studio) -> None:
    made(studio, "good", rights=[True] * 12)
    made(studio, "bad", rights=[False] * 12)
    text = browser.get("/runs/compare?name=good&name=bad").text
    assert "good is better than bad: +100.0 points of accuracy (95 % interval" in text and "12 rows" in text
    assert "<script>alert" not in text and "McNemar" in text
    assert "bad is worse than good" in browser.get("/runs/compare?name=bad&name=good").text
    assert browser.get("/runs/compare?name=good").status_code == 400


def test_runs_that_list_too_few_rows_are_measured_first(browser: TestClient, studio: Studio) -> None:
    made(studio, "a", rights=[True] * 12)
    made(studio, "b")
    address = "/runs/compare?name=a&name=b"
    assert "Measure on all rows" in browser.get(address).text
    for _ in range(2):  # a second press changes nothing
        assert browser.post(address).status_code == 303
    [job] = studio.queue.jobs()
    assert job.words[:2] == ("evaluate", str(studio.places.runs / "b")) and "run.yaml" in job.words[3]
    assert "data-reload" in browser.get(address).text
    write_report(Report("x", rows=(SideBySide(f"{HOSTILE} 3", "yes", ScoredAnswer(), ScoredAnswer(right=False)),), rows_of=1),
                 measured_folder(studio.places, "b"))  # fmt: skip
    text = browser.get(address).text
    assert "No difference is shown between a and b" in text and "11 rows of a" in text


def test_a_run_is_deleted_with_undo(browser: TestClient, studio: Studio) -> None:
    made(studio, "a")
    led = browser.post("/runs/a/delete").headers["location"]
    assert lines_of(studio) == [] and "was deleted" in browser.get(led).text
    key = led.partition("undo=")[2].replace("%40", "@")
    assert browser.post("/runs/restore", data={"key": key}).status_code == 303
    assert [line.run.name for line in lines_of(studio)] == ["a"]
    led = browser.post("/runs/a/delete").headers["location"]
    browser.post("/runs/erase", data={"key": led.partition("undo=")[2].replace("%40", "@")})
    assert browser.post("/runs/restore", data={"key": key}).status_code == 404


def test_an_empty_list_teaches(browser: TestClient) -> None:
    text = browser.get("/runs").text
    assert "There are no runs yet" in text and "Try the quickstart" in text


@pytest.mark.parametrize(("seconds", "words"), [(5, "just now"), (60, "1 minute ago"), (7300, "2 hours ago"), (9e4, "1 day ago")])
def test_ages_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert age_of(seconds) == words


def test_small_curves_fill_their_box() -> None:
    assert sparkline((3.0, 1.0, 2.0)) == "0.0,2.0 50.0,22.0 100.0,12.0" and sparkline((1.0,)) == ""
    assert sparkline((1.0, 1.0)) == "0.0,22.0 100.0,22.0"


def test_runs_that_were_measured_in_different_ways_can_be_measured_again(browser: TestClient, studio: Studio) -> None:
    made(studio, "good", rights=[True] * 12)
    folder = made(studio, "other")
    rows = [SideBySide(f"{HOSTILE} {i}", "yes", ScoredAnswer("no"), ScoredAnswer("yes")) for i in range(12)]
    write_report(Report("x", rows=tuple(rows), rows_of=12), folder)
    text = browser.get("/runs/compare?name=good&name=other").text
    assert "measured in different ways" in text and "Measure on all rows</button>" in text
    browser.post("/runs/compare?name=good&name=other", data={"missing": "good/other"})
    assert [job.title for job in studio.queue.jobs()] == ["Measure good on all rows", "Measure other on all rows"]


def test_deleting_for_good_is_a_second_step(browser: TestClient, studio: Studio) -> None:
    made(studio, "mine")
    browser.post("/runs/mine/delete")
    assert "cannot be restored then" in browser.get("/runs").text

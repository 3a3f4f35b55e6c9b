"""`studio.pages`: a form that starts something is carried out once, and any name may be in an answer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, write_report
from lorakeet.studio.app import make_studio, studio_app
from lorakeet.studio.pages import Studio, json_answer
from lorakeet.studio.places import Places
from lorakeet.studio.safety import csrf_of
from studio.conftest import ADDRESS

EMPTY, PAGES = ["/runs", "/result", "/try"], [
    "/", "/run", "/result/mine", "/take/mine", "/try", "/try/strengths/drawing", "/runs/compare?name=mine&name=other"
]  # fmt: skip
STARTS = r"/quickstart|/run|/run/mine/resume|/try/open|/try/strengths/drawing|/take/mine/\w+|/runs/compare\?.*"
OTHERS = r"/run/mine/stop"  # a second signal is not sent
FILLED = {"/try/open": {"run": "mine"}, "/try/strengths/drawing": {"prompt": "a red box"}}


class Forms(HTMLParser):
    """The posted forms of a page: where to, and the hidden fields."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.inside = given.get("method") == "post"
            if self.inside:
                self.found.append((given["action"], {}))
        elif tag == "input" and self.inside and given.get("type") == "hidden":
            self.found[-1][1][given["name"]] = given["value"]


@pytest.fixture
def runs(studio: Studio) -> None:
    """Two runs that could be resumed and have a report of some of their rows, and one of pictures."""
    rows = tuple(SideBySide(f"row {n}", "yes", ScoredAnswer("no"), ScoredAnswer("yes", right=True)) for n in range(12))
    for name, kind in (("mine", "text"), ("other", "text"), ("drawing", "image")):
        folder = studio.places.runs / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "config.yaml").write_text(json.dumps({"model": "m", "data": "rows.jsonl", "kind": kind}))
        (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
        if kind == "text":
            write_report(Report(name, rows=rows, rows_of=40), folder)


def forms_of(browser: TestClient, pages: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    for page in pages:
        yield from Forms(browser.get(page).text).found


def twice(browser: TestClient, studio: Studio, forms: Iterator[tuple[str, dict[str, str]]], filled: dict[str, str]) -> set[str]:
    """Sends each form that starts something two times, and stops what that has made; returns where they went."""
    sent = set()
    for action, hidden in forms:
        if re.fullmatch(OTHERS, action):
            continue
        assert re.fullmatch(STARTS, action), f"{action} is a new form: does it start something?"
        assert hidden.get("once"), f"{action} has no number, so a second click would start it again"
        own = {**hidden, **FILLED.get(action, {}), **(filled if action in ("/run", "/take/mine/answer") else {})}
        counts = [len(studio.queue.jobs())]
        answers = []
        for _ in range(2):
            answers.append(browser.post(action, data=own))
            counts.append(len(studio.queue.jobs()))
        if action == "/take/mine/push":
            continue  # it needs a name on a hub
        assert [answer.status_code for answer in answers] == [303, 303], (action, answers[0].text)
        assert len({answer.headers["location"] for answer in answers}) == 1 and counts[0] < counts[1] == counts[2], action
        for job, state in studio.queue.going():
            if state == "waiting":
                studio.queue.stop(job)
        sent.add(action.partition("?")[0])
    return sent


@pytest.mark.slow
@pytest.mark.usefixtures("runs")
def test_a_second_click_starts_nothing(browser: TestClient, studio: Studio, tmp_path: Path) -> None:
    (studio.places.runs / "mine" / "report.json").rename(tmp_path / "report.json")  # a run with a report is not resumed
    (tmp_path / "models" / "tiny").mkdir()
    rows = tmp_path / "models" / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    filled = {"model.path": str(tmp_path / "models" / "tiny"), "data.train": str(rows)}
    resumed = twice(browser, studio, forms_of(browser, ["/run/mine"]), filled)
    (tmp_path / "report.json").rename(studio.places.runs / "mine" / "report.json")
    sent = twice(browser, studio, forms_of(browser, PAGES), filled)
    ways = {f"/take/mine/{way}" for way in ("answer", "merge", "gguf", "ollama", "mlx")}
    assert resumed == {"/run/mine/resume"}
    assert sent == {"/quickstart", "/run", "/try/open", "/try/strengths/drawing", "/runs/compare", *ways}


def test_the_page_that_says_what_is_fetched_starts_one_quickstart(browser: TestClient, studio: Studio) -> None:
    """The others lead to it: they started 99.6 MB of packages without a word."""
    for page in EMPTY:
        assert twice(browser, studio, forms_of(browser, [page]), {}) == ({"/quickstart"} if page == "/" else set())
        assert page == "/" or 'href="/">Try the quickstart' in browser.get(page).text


@pytest.mark.usefixtures("runs")
def test_another_wish_on_the_same_page_is_another_job(browser: TestClient, studio: Studio) -> None:
    """A browser's Back may bring a form with its number again."""
    for name in ("one", "two", "two"):
        assert browser.post("/take/mine/merge", data={"once": "a", "name": name}).status_code == 303
    assert [job.title for job in studio.queue.jobs()] == ["One whole model: one", "One whole model: two"]


def test_a_folder_whose_name_is_no_text_serves_all_the_same(tmp_path: Path) -> None:
    """A file system may have bytes in it that are not UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    studio = make_studio(Places.of(folder / "runs", (folder / "rows",)))
    with TestClient(studio_app(studio), base_url=ADDRESS, follow_redirects=False) as browser:
        browser.get(f"/?token={studio.token}")
        browser.headers.update({"origin": ADDRESS, "x-csrf": csrf_of(studio.token)})
        for page in ("/", "/data", "/fit", "/run", "/runs", "/result", "/try", "/take"):
            assert browser.get(page).status_code in (200, 303), page
        sent = browser.put("/rows/b.csv", content=b"text,label\na,b\n").json()
        assert sent["path"].endswith("caf\udce9/runs/.studio/rows/b.csv")
        assert browser.post("/run-check", data={"out": "x"}).status_code == 200
        assert browser.post("/runs/x/tags", data={"tags": "a"}, headers={"accept": "application/json"}).status_code == 404
        assert browser.post("/quickstart").status_code == 303
    assert json_answer({"a": "\udce9"}).body == b'{"a": "\\udce9"}'
    studio.workbench.close()

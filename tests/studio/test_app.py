"""`studio.app` and `studio.pages`: pages, static files, errors; and how large it all is."""

from __future__ import annotations

import errno
import re
from importlib.resources import files

import pytest
from starlette.testclient import TestClient

from lorakeet.errors import ConfigError
from lorakeet.studio.app import SCREENS
from lorakeet.studio.jobs import Queue
from lorakeet.studio.pages import Studio, asset, event, problems_of

MOST_BYTES = 250_000


def test_templates_styles_and_modules_are_small() -> None:
    parts = [entry for folder in ("templates", "static") for entry in (files("lorakeet.studio") / folder).iterdir()]
    size = sum(len(entry.read_bytes()) for entry in parts)
    print(f"{size:,} bytes in {len(parts)} files")
    assert len(parts) > 5 and size <= MOST_BYTES
    kinds = {entry.name.rpartition(".")[2] for entry in parts}
    assert kinds <= {"html", "css", "js", "svg"}


def test_nothing_is_fetched_from_elsewhere() -> None:
    for folder in ("templates", "static"):
        for entry in (files("lorakeet.studio") / folder).iterdir():
            text = entry.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
            assert not re.search(r"(src|href|url\(|import|fetch\()[^\n]{0,5}https?://", text), entry.name
            assert not re.search(r"\sstyle=|<script(?![^>]*src=)|\son\w+=\"|innerHTML|\|\s*safe\b|Markup", text), entry.name


def test_every_screen_is_in_the_navigation_and_opens(browser: TestClient) -> None:
    for screen in SCREENS:
        opened = browser.get(screen.path)
        assert opened.status_code == 200, opened.text
        assert re.search(rf'aria-current="page">{screen.title}</a>', opened.text)


@pytest.mark.parametrize("name", ["gone.js", "..%2fapp.py", "../app.py", "base.html", "__init__.py"])
def test_only_static_files_are_served(browser: TestClient, name: str) -> None:
    assert browser.get("/static/studio.css").headers["content-type"].startswith("text/css")
    assert browser.get("/static/report.css").status_code == 200
    assert browser.get(f"/static/{name}").status_code == 404


def test_errors_are_pages_with_the_message_escaped(browser: TestClient) -> None:
    lost = browser.get("/<script>alert(1)</script>")
    assert lost.status_code == 404 and "<script>alert" not in lost.text and "&lt;script&gt;" in lost.text


def test_a_full_disk_is_said_on_a_page(browser: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Queue, "add", full)
    said = browser.post("/quickstart")
    assert said.status_code == 400 and "No space left on device" in said.text and "Free some space" in said.text
    assert browser.get("/").status_code == 200


def test_an_event_is_one_event_whatever_it_carries() -> None:
    made = event({"text": "a\n\ndata: b"}, name="step", id="7")
    assert made == 'event: step\nid: 7\ndata: {"text": "a\\n\\ndata: b"}\n\n'
    assert problems_of(ConfigError("both", problems=[ConfigError("one"), ConfigError("two")])) == ["one", "two"]
    assert "{% block main %}" in asset("templates", "base.html") and Studio.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_a_page_that_is_opened_the_wrong_way_is_not_said_to_be_missing(browser: TestClient) -> None:
    said = browser.get("/quickstart").text
    assert "Method Not Allowed" in said and "There is no page" not in said
    assert "There is no page /gone" in browser.get("/gone").text

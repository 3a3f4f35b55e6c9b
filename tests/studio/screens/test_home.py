"""`studio.screens.home`: the first page of somebody new, and the quickstart."""

from __future__ import annotations

from starlette.testclient import TestClient

from lorakeet.studio.pages import Studio
from lorakeet.studio.screens.home import quickstart_config


def test_an_empty_studio_teaches_and_offers_the_quickstart_first(browser: TestClient) -> None:
    text = browser.get("/").text
    assert 0 < text.index("Start the quickstart") < text.index("Your own rows") and "lorakeet quickstart" in text


def test_the_quickstart_is_the_commands_own(browser: TestClient, studio: Studio) -> None:
    started = browser.post("/quickstart")
    [job] = studio.queue.jobs()
    assert job.words[:2] == ("quickstart", "--out") and started.headers["location"] == f"/run/{job.run}"
    assert quickstart_config(job.words[2]).out == str(studio.places.runs / job.run)

"""`studio.screens.home`: the first page of somebody new, and the quickstart."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lorakeet.studio.pages import Studio
from lorakeet.studio.screens.home import quickstart_config
from studio.screens.test_runs import made


def test_an_empty_studio_teaches_and_offers_the_quickstart_first(browser: TestClient) -> None:
    text = browser.get("/").text
    assert 0 < text.index("Start the quickstart") < text.index("Your own rows") and "lorakeet quickstart" in text


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="whether a run goes on is read from /proc/locks")
def test_the_newest_runs_have_the_state_of_their_own_pages(browser: TestClient, studio: Studio) -> None:
    """A run that trains is not called stopped, and its link leads to where it is followed."""
    folder = made(studio, "mine")
    assert "mine</a> <span class=\"soft\">stopped" in browser.get("/").text
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = browser.get("/").text
    assert 'href="/run/mine">mine</a> <span class="soft">running' in text
    studio.queue.add(["finetune"], title="x", run="coming")
    assert 'coming</a> <span class="soft">waiting' in browser.get("/").text
    made(studio, "over", rights=[True] * 3)
    assert 'href="/result/over"' in browser.get("/").text


def test_the_quickstart_is_the_commands_own(browser: TestClient, studio: Studio) -> None:
    started = browser.post("/quickstart")
    [job] = studio.queue.jobs()
    assert job.words[:2] == ("quickstart", "--out") and started.headers["location"] == f"/run/{job.run}"
    assert quickstart_config(job.words[2]).out == str(studio.places.runs / job.run)

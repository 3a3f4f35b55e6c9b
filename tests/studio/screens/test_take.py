"""`studio.screens.take`: the page of ways out, checks while a form changes, jobs of the queue, and their events."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lorakeet.studio.pages import Studio
from lorakeet.studio.screens import take as module
from lorakeet.studio.screens.take import job_shown, taken_runs, without_earlier_attempts
from studio.screens.test_fit import Made


@pytest.fixture
def run(studio: Studio) -> Path:
    folder = studio.places.runs / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: package:tiny\ndata: rows.jsonl\n")
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    object.__setattr__(studio, "workbench", Made({"sizes": {"merge": "1 MiB"}, "quants": {}}, {"done": True}))
    return folder


def test_without_a_run_the_page_teaches(browser: TestClient) -> None:
    text = browser.get("/take").text
    assert "Nothing to take away yet" in text and 'href="/run"' in text


def test_the_newest_run_with_an_adapter_is_shown(browser: TestClient, studio: Studio, run: Path) -> None:
    assert taken_runs(studio) == ["mine"] and browser.get("/take").headers["location"] == "/take/mine"
    text = browser.get("/take/mine").text
    assert "labels that are less than 80 % likely, and answers whose like the report found right in less than 80 % of" in text
    assert 'data-way="gguf"' in text and 'data-way="kohya"' not in text and 'placeholder="mine-f16.gguf"' in text
    assert browser.get("/take/gone").status_code == 404


def test_a_form_says_the_command_or_what_is_missing(browser: TestClient, run: Path) -> None:
    found = browser.post("/take/mine/merge/check", data={"name": ""}).json()
    assert found == {"missing": "", "command": f"lorakeet merge {run} --out {run}-merged"}
    assert "plain name" in browser.post("/take/mine/merge/check", data={"name": "../x"}).json()["missing"]
    push = browser.post("/take/mine/push/check", data={"name": ""}).json()
    assert push["command"] == "" and push["missing"]


def test_a_way_out_is_a_job_of_the_queue(browser: TestClient, studio: Studio, run: Path) -> None:
    assert browser.post("/take/mine/gguf", data={"quant": "f16"}).headers["location"] == "/take/mine"
    [job] = studio.queue.jobs()
    assert job.words == ("export", str(run), "--quant", "f16", "--out", f"{run}-f16.gguf")
    assert job.title == "One GGUF file: mine-f16.gguf"
    assert job.run == "", "the page of the run still shows its training"
    assert job_shown(job)["command"].startswith("lorakeet export ")
    (studio.places.runs / "mine-merged").mkdir()
    refused = browser.post("/take/mine/merge")
    assert refused.status_code == 400 and "exists already" in refused.text and len(studio.queue.jobs()) == 1


def test_what_another_tab_makes_is_not_made_twice(browser: TestClient, studio: Studio, run: Path) -> None:
    assert browser.post("/take/mine/merge", data={"once": "a"}).status_code == 303
    assert browser.post("/take/mine/merge/check", data={}).json()["missing"] == "mine-merged is being made already; see above."
    assert browser.post("/take/mine/merge", data={"once": "b"}).status_code == 400 and len(studio.queue.jobs()) == 1


def test_events_come_when_a_job_changes(studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = studio.queue.add(["merge", str(run), "--out", f"{run}-merged"], title="<b>One</b>")
    monkeypatch.setattr(module, "EVERY", 0)

    async def events() -> list[Any]:
        found = []
        async for text in module._stream(studio, "mine"):
            found.append(json.loads(text.partition("data: ")[2])["jobs"])
            if len(found) == 2:
                return found
            (job.folder / "cancelled").touch()
        return found

    first, second = asyncio.run(events())
    assert [one[0]["state"] for one in (first, second)] == ["waiting", "cancelled"] and first[0]["title"] == "<b>One</b>"


def test_sizes_come_from_the_workbench(studio: Studio, run: Path) -> None:
    async def collect() -> list[str]:
        return [text async for text in module._measured(studio, "mine")]

    found = asyncio.run(collect())
    assert found[0].startswith("event: sizes") and '"1 MiB"' in found[0] and found[1].startswith("event: done")
    object.__setattr__(studio, "workbench", Made({"error": {"message": "no model"}}))
    assert "no model" in asyncio.run(collect())[0]


def test_an_attempt_that_was_mended_and_tried_again_is_not_shown(studio: Studio, run: Path) -> None:
    jobs = [studio.queue.add(["predict", str(run)], title=f"Rows answered: {name}") for name in "aba"]
    for job, code in zip(jobs, "220", strict=True):
        (job.folder / "alive").touch()
        (job.folder / "code").write_text(code)
    newest_first = [jobs[2], jobs[1], jobs[0]]
    assert without_earlier_attempts(newest_first) == [jobs[2], jobs[1]]
    (jobs[0].folder / "code").write_text("0")
    assert without_earlier_attempts(newest_first) == newest_first, "what it has made stays"
    (jobs[2].folder / "code").write_text("2")
    assert without_earlier_attempts(newest_first) == newest_first

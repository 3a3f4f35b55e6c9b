"""`studio.screens.answer`: the form of a file of rows, and the answered file that the browser saves."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from lorakeet.studio.pages import Studio
from lorakeet.studio.screens.take import job_shown
from studio.test_answering import over, rows, run  # noqa: F401


def test_a_file_is_answered_and_saved(browser: TestClient, studio: Studio, run: Path, rows: Path) -> None:  # noqa: F811
    text = browser.get("/take/mine").text
    assert 'action="/take/mine/answer"' in text and 'placeholder="cp1252"' in text and str(rows) in text
    form = {"data.train": str(rows), "once": "a"}
    checked = browser.post("/take/mine/answer/check", data={**form, "data.delimiter": ";"}).json()
    words = f"'--data={rows}' --out 'December notes-answered.csv' '--delimiter=;'"
    assert checked == {"missing": "", "command": f"lorakeet predict {run} {words}"}
    assert "does not exist" in browser.post("/take/mine/answer/check", data={"data.train": "gone.csv"}).json()["missing"]
    assert browser.post("/take/mine/answer", data=form).headers["location"] == "/take/mine"
    browser.post("/take/mine/answer", data=form)  # a second click
    [job] = studio.queue.jobs()
    assert browser.get(f"/take/mine/saved/{job.name}").status_code == 404
    Path(job.words[-1]).write_bytes("What happened,answer\r\n<b>café</b>,x\r\n".encode("cp1252"))
    over(job, 0, "1 of 1 rows answered: x")
    assert job_shown(job)["saves"] == "December notes-answered.csv"
    saved = browser.get(f"/take/mine/saved/{job.name}")
    assert saved.content == b"What happened,answer\r\n<b>caf\xe9</b>,x\r\n"
    assert saved.headers["content-disposition"].startswith("attachment") and "nosniff" in saved.headers["x-content-type-options"]
    assert browser.post("/take/mine/answer", data={}).status_code == 400
    assert browser.get(f"/take/other/saved/{job.name}").status_code == 404
    assert browser.post(f"/take/mine/saved/{job.name}/delete").headers["location"] == "/take/mine"
    assert studio.queue.jobs() == [] and browser.post(f"/take/mine/saved/{job.name}/delete").status_code == 404


def test_a_name_that_is_no_text_is_saved(browser: TestClient, studio: Studio, run: Path) -> None:  # noqa: F811
    """A file system may have bytes in it that are not UTF-8."""
    job = studio.queue.add(["predict", str(run), "--out", "{folder}/caf\udce9 1.csv"], title="x")
    Path(job.words[-1]).write_text("answered")
    over(job, 0, "")
    saved = browser.get(f"/take/mine/saved/{job.name}")
    assert saved.text == "answered" and saved.headers["content-disposition"] == "attachment; filename*=utf-8''caf%3F%201.csv"


def test_a_run_of_pictures_answers_no_rows(browser: TestClient, run: Path) -> None:  # noqa: F811
    (run / "config.yaml").write_text("model: m\ndata: r\nkind: image\n")
    assert "/answer" not in browser.get("/take/mine").text

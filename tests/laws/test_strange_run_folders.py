"""The studio's pages on run folders and jobs as a stranger may have made them: each is a page or one message."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette, of the extra lorakeet[studio], serves the pages")

from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from evaluate.conftest import example_report
from lorakeet.evaluate.values import from_text, to_text
from lorakeet.studio.app import make_studio, studio_app
from lorakeet.studio.index import RunSummary
from lorakeet.studio.jobs import read_job
from lorakeet.studio.places import Places
from lorakeet.studio.trial import current_trial
from tiny.damage import other_folder, put
from tiny.fuzz import case_folder, fuzzed

CONFIG = "model:\n  path: package:tiny\ndata: rows.jsonl\ntrain:\n  epochs: 2\nmemory:\n  budget: 4GiB\n"
PAGES = ("/", "/runs", "/run/x", "/run/x/state", "/run/x/events", "/result/x", "/result/x/report", "/try", "/runs/overlay?name=x",
         "/runs/compare?name=x&name=good")  # fmt: skip


@cache
def run_files() -> dict[str, bytes]:
    """The files of a finished run that pages read."""
    report = example_report()
    whole = replace(report, rows=report.rows[:3], rows_of=3)
    lines: list[dict[str, Any]] = [{"step": 0, "held_out_loss": 2.0, "low": 1.9, "high": 2.1}]
    lines += [{"step": step, "epoch": step / 4, "loss": 2.0 / step, "seconds": 0.5 * step, "tokens_per_second": 9.5,
               "memory_bytes": 10**9} for step in range(1, 9)]  # fmt: skip
    assert report.certificate is not None
    passed = {**json.loads(to_text(report.certificate)), "passed": True}
    return {
        "config.yaml": CONFIG.encode(), "metrics.jsonl": "".join(f"{json.dumps(line)}\n" for line in lines).encode(),
        "report.json": to_text(whole).encode(), "certificate.json": json.dumps(passed).encode(),
        ".studio.json": b'{"tags": ["a", "b"]}',
    }  # fmt: skip


JOB = {"words": ["serve", "--model", "x"], "title": "Try x", "run": "x", "device": "cpu", "made": 1.0, "once": "o"}
JOB_FILES = {
    "job.json": json.dumps(JOB).encode(), "trial.json": json.dumps({"run": "x", "port": 9, "key": "k" * 32}).encode(),
    "run.yaml": CONFIG.encode(), "alive": b"", "pid": b"4194000\n", "code": b"1\n", "log": b"a line\nError: what it said\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[TestClient]:
    """A browser of a studio on the run `good`; any exception of a page is one of the test."""
    with case_folder() as folder:
        studio = make_studio(Places.of(folder, (folder,)))
        put(run_files(), folder / "good")
        with TestClient(studio_app(studio), base_url="http://127.0.0.1:8017", follow_redirects=False) as client:
            assert client.get(f"/?token={studio.token}").status_code == 200
            client.studio = studio  # type: ignore[attr-defined]
            yield client


def shown(browser: TestClient, page: str) -> str:
    """The text of a page; the values of its events must be JSON that a browser reads."""
    answer = browser.get(page)
    assert answer.status_code in (200, 303, 400, 404), (page, answer.status_code)
    for line in answer.text.splitlines() if page.endswith("/events") else ():
        if line.startswith("data: "):
            json.loads(line[6:], parse_constant=lambda name: pytest.fail(f"{page} sends {name}"))
    return answer.text


@pytest.mark.slow
@fuzzed(quick=60, many=10_000)
@given(files=st.deferred(lambda: other_folder(run_files())), page=st.sampled_from(PAGES))
def test_pages_of_any_run_folder(browser: TestClient, files: dict[str, bytes], page: str) -> None:
    folder = browser.studio.places.runs / "x"  # type: ignore[attr-defined]
    put(files, folder)
    try:
        text = shown(browser, page)
        assert page != "/runs" or "good" in text, "the other run is listed"
    finally:
        shutil.rmtree(folder)


JOB_PAGES = ["/", "/runs", "/run", "/run/x", "/try", "/try/state"]  # events of a job that waits do not end


@pytest.mark.slow
@fuzzed(quick=60, many=10_000)
@given(files=other_folder(JOB_FILES), page=st.sampled_from(JOB_PAGES))
def test_pages_with_any_job(browser: TestClient, files: dict[str, bytes], page: str) -> None:
    queue = browser.studio.queue  # type: ignore[attr-defined]
    folder = put(files, queue.jobs_folder / "20260101-000000-000000-aaaaaa")
    try:
        shown(browser, page)
        job = read_job(folder)
        assert job is None or (job.state and (job.code or 0) < 10**9 and all(isinstance(word, str) for word in job.words))
        assert (trial := current_trial(queue)) is None or 0 <= trial.port < 1 << 16  # 0: not known yet
    finally:
        shutil.rmtree(folder)
        queue._known.clear()
        queue._over.clear()


HUGE = b"1" + b"0" * 400
ODD = {  # what was found otherwise
    "report.json": [b'{"title": "\\ud800"}',
                    b'{"title": "x", "memory": [{"what": "y", "planned": ' + HUGE + b', "used": 1}]}'],
    "metrics.jsonl": [b'{"step": 1, "loss": NaN}\n', b'{"step": 1, "loss": 1e999}\n', b"[" * 100_000 + b"\n",
                      b'{"step": 1, "loss": 1.0, "memory_bytes": ' + HUGE + b"}\n",
                      b'{"step": 9, "loss": 1.0, "epoch": 1e-320}\n'],
    "certificate.json": [b"[" * 100_000, b'{"passed": [1]}'],
    ".studio.json": [b"[" * 100_000, b'{"tags": ["\\ud800"]}', b'{"tags": 3}'],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data"), [(name, data) for name, texts in ODD.items() for data in texts])
def test_odd_files_end_no_page(browser: TestClient, name: str, data: bytes) -> None:
    folder = put({**run_files(), name: data}, browser.studio.places.runs / "x")  # type: ignore[attr-defined]
    try:
        for page in PAGES:
            shown(browser, page)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl", "certificate.json", ".studio.json", "run.yaml"])
def test_pipes_and_links_are_not_read(browser: TestClient, name: str) -> None:
    runs = browser.studio.places.runs  # type: ignore[attr-defined]
    folder = put(run_files(), runs / "x")
    (folder / name).unlink(missing_ok=True)
    try:
        os.mkfifo(folder / name)
        for page in PAGES:
            shown(browser, page)
        (folder / name).unlink()
        (folder / name).symlink_to("/etc/passwd")
        for page in PAGES:
            assert "root:" not in shown(browser, page)
    finally:
        shutil.rmtree(folder)


def test_a_name_that_is_no_text_is_no_run(browser: TestClient) -> None:
    runs = browser.studio.places.runs  # type: ignore[attr-defined]
    folder = os.fsencode(runs) + b"/\xff\xfe"
    os.mkdir(folder)
    try:
        shutil.copy(runs / "good" / "config.yaml", folder + b"/config.yaml")
        assert "good" in shown(browser, "/runs")
    finally:
        shutil.rmtree(folder)


def test_a_summary_in_the_cache_reads_again_as_it_was(browser: TestClient) -> None:
    [summary] = browser.studio.index.summaries()  # type: ignore[attr-defined]
    assert from_text(RunSummary, to_text(summary), where="x") == summary and summary.passed and summary.verdict

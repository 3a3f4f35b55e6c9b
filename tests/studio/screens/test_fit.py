"""`studio.screens.fit`: the page of memory: fields, the same command, and events that end with what is wrong or done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

from lorakeet.errors import ConfigError
from lorakeet.studio.pages import Studio
from lorakeet.studio.screens import fit as module
from lorakeet.studio.screens.fit import MACHINES, OWN_BUDGET, SLIDERS, named_fields, same_words
from lorakeet.verbs.options import MachineName

MODEL = {"model.path": "meta-llama/Llama-3.2-1B"}


class Made:
    """A workbench that answers at once, and keeps what it was given."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.found, self.given = answers, dict[str, Any]()

    async def answers(self, work: str, settings: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self.given = {"work": work, **settings}
        for answer in self.found:
            yield answer

    def start(self) -> None:
        self.given = {"started": True}

    def close(self) -> None:
        """Nothing is open."""


def events(studio: Studio, settings: Mapping[str, str], machine: str = "this") -> list[tuple[str, Any]]:
    async def collect() -> list[str]:
        return [text async for text in module._stream(studio, settings, machine)]

    found = [text.partition("\ndata: ") for text in asyncio.run(collect())]
    return [(name.removeprefix("event: "), json.loads(data)) for name, _, data in found]


@pytest.fixture
def made(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Made:
    found = Made({"part": {"state": "fits"}}, {"done": True})
    object.__setattr__(studio, "workbench", found)
    return found


def test_every_machine_of_the_command_can_be_chosen() -> None:
    assert set(MACHINES) - {OWN_BUDGET} == set(get_args(MachineName))


def test_the_page_has_each_field_once_and_keeps_what_the_address_says(browser: TestClient, made: Made) -> None:
    text = browser.get("/fit", params={**MODEL, "lora.rank": "64", "train.seed": "9", "machine": "gpu-24"}).text
    assert text.count('name="model.path"') == 1 and 'value="64"' in text and made.given == {"started": True}
    assert '<input type="hidden" name="train.seed" value="9">' in text and '<option value="gpu-24" selected>' in text
    assert all(f'data-for="{field.id}"' in text for field in named_fields(tuple(SLIDERS)))


def test_the_command_and_the_file_are_the_same_run() -> None:
    found = same_words({**MODEL, "lora.rank": "8"}, "gpu-12")
    assert found["command"] == "lorakeet plan --model meta-llama/Llama-3.2-1B --lora.rank 8 --machine gpu-12"
    assert found["file"] == "", "without rows nothing can be trained"
    assert "--machine" not in same_words({**MODEL, "memory.budget": "2GiB"}, OWN_BUDGET)["command"]
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        same_words({**MODEL, "lora.rank": "x"}, "this")


def test_events_carry_the_parts_and_the_machine(studio: Studio, made: Made) -> None:
    found = events(studio, MODEL, "gpu-12")
    assert [name for name, _ in found] == ["same", "part", "done"] and made.given["machine"] == "gpu-12"


def test_what_is_wrong_is_said_in_place_and_nothing_outside_is_read(studio: Studio, made: Made) -> None:
    [(name, values)] = events(studio, {**MODEL, "data.train": "/etc/passwd"})
    assert name == "problems" and "outside of the folders" in values["problems"][0] and made.given == {}
    made.found = ({"error": ConfigError("both", problems=[ConfigError("one"), ConfigError("two")]).to_mapping()},)
    assert events(studio, MODEL)[-1] == ("problems", {"problems": ["one", "two"], "remedies": []})


def test_rows_that_are_not_there_are_named(studio: Studio, made: Made, tmp_path: Path) -> None:
    (tmp_path / "models" / "rows.csv").write_text("a,b\n1,2\n")
    [(name, values)] = events(studio, {**MODEL, "data.train": str(tmp_path / "models" / "rows.csv")})
    assert name == "problems" and "match no known shape" in values["problems"][0]

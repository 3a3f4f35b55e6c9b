"""`studio.fitting`: what the screen Fit says is what `lorakeet plan` finds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.forecast import KINDS, Phase
from lorakeet.studio import fitting
from lorakeet.studio.fitting import ON_GPU, WORDS, bar_values, changed_settings, fit, time_words
from lorakeet.workflows.planning import text_run
from tiny.configs import SMALL

GPU = {"model.device": "cuda:0", "data.max_tokens": "512", "train.micro_tokens": "1024"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings of a run on a folder that has a small model's configuration and nothing else."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": 6, "max_position_embeddings": 2048}))
    return {"model.path": str(folder), **GPU}


def parts_of(settings: Mapping[str, str]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    fit(settings, lambda values: sent.append(values["part"]))
    return sent


def test_what_fits_needs_no_other_way(model: dict[str, str]) -> None:
    first, last = parts_of({**model, "machine": "gpu-8"})
    assert first["state"] == last["state"] == "fits" and last["way"] == "" and last["whole"] is None and last["helping"] == []
    assert last["sentence"].startswith("It fits: ") and last["sentence"].endswith(" GiB free on a GPU of 8 GB.")
    assert sum(kind["bytes"] for kind in last["bar"]["kinds"]) == last["bar"]["bytes"] < last["limit"]
    assert last["bar"]["kinds"][0]["words"] == "the model" and "Memory on cuda:0" in last["printed"]
    assert "on a GPU is not estimated" in last["time"]


def test_what_does_not_fit_at_once_is_said_before_the_way_that_fits(
    model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_run, "MOST_TOGETHER", 1)  # rehearses less
    whole = parts_of({**model, "memory.budget": "20GB"})[0]["bar"]["bytes"]
    first, last = parts_of({**model, "memory.budget": f"{whole // 1000 - 1000}KB", "machine": "gpu-8"})
    assert first["state"] == "searching" and first["sentence"].startswith("With everything in memory it takes ")
    assert last["state"] == "otherwise" and "of the budget of " in last["sentence"] and last["way"].endswith(".")
    assert last["whole"]["bytes"] == whole > last["limit"] >= last["bar"]["bytes"]


def test_rows_are_not_read_where_that_would_fetch_or_unpack(model: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "unready_model", lambda config: "it is to be unpacked")
    last = parts_of({**model, "machine": "gpu-8", "data.train": "rows.jsonl"})[-1]
    assert last["state"] == "fits" and "without reading your rows: it is to be unpacked" in last["printed"]


def test_what_is_wrong_is_raised_as_by_the_command() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        fit({"model.path": "m", "lora.rank": "x"}, lambda values: None)


def test_every_kind_of_memory_has_plain_words() -> None:
    assert set(WORDS) == set(ON_GPU) == set(KINDS)
    bar = bar_values(Phase("train step", {"logits": 1 << 20, "base": 3 << 20}), WORDS)
    assert bar["size"] == bytes_text(4 << 20) and [kind["kind"] for kind in bar["kinds"]] == ["base", "logits"]


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ("--model.quantize nf4", {"model.quantize.method": "nf4"}),
        ("--data.max_tokens 256 --train.micro_tokens 512", {"data.max_tokens": "256", "train.micro_tokens": "512"}),
        ("diffusion.at_once 1 and diffusion.checkpointing", {"diffusion.at_once": "1", "diffusion.checkpointing": "true"}),
        ("close other programs", {}),
    ],
)
def test_an_advice_is_settings_that_a_button_can_set(change: str, settings: dict[str, str]) -> None:
    assert changed_settings(change) == settings


def test_the_time_of_pictures_is_said_to_be_unknown() -> None:
    assert "of a run on pictures" in time_words(SimpleNamespace(device=SimpleNamespace(type="cpu")))  # type: ignore[arg-type]

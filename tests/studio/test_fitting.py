"""`studio.fitting`: what the screen Fit says is what `lorakeet plan` finds."""

from __future__ import annotations

import json
import pickle
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode  # torch offers no public name

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory import ledger
from lorakeet.memory.forecast import KINDS, Phase
from lorakeet.memory.remembered import remembering
from lorakeet.planning import encoded_rows, forecast_text_run, text_run
from lorakeet.planning.rehearsal_key import NO_SHAPES
from lorakeet.planning.rehearse_text import RowShape
from lorakeet.studio import fitting
from lorakeet.studio.fitting import ON_GPU, WORDS, bar_values, fit, time_words
from lorakeet.studio.workbench import PREPARED, prepare_for
from tiny.configs import SMALL
from tiny.models import save_tiny_llama
from tiny.runs import write_rows

GPU = {"model.device": "cuda:0", "data.max_tokens": "512", "train.micro_tokens": "1024"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings of a run on a folder that has a small model's configuration and nothing else."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": 6, "max_position_embeddings": 2048}))
    return {"model.path": str(folder), **GPU}


def parts_of(settings: Mapping[str, str]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    fit(settings, lambda values: sent.append(values["part"]) if "part" in values else None)
    return sent


def test_the_workbench_begins_with_the_code_that_plans_need(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []
    monkeypatch.setattr(fitting, "import_module", wanted.append)
    for missing, expected in (("", ["bitsandbytes"]), ("bitsandbytes is not installed.", [])):
        wanted.clear()
        monkeypatch.setattr(fitting, "missing_package", lambda name, versions, missing=missing: missing)
        for function in fitting.AT_START:
            function()
        assert wanted == expected
    assert "lorakeet.studio.fitting" in PREPARED and set(fitting.AT_START) == {
        fitting.import_packages, fitting.import_published_code,
    }  # fmt: skip
    assert {f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2")} <= set(sys.modules)


@pytest.mark.slow
def test_what_fits_needs_no_other_way(model: dict[str, str]) -> None:
    first, last = parts_of({**model, "machine": "gpu-8"})
    assert first["state"] == last["state"] == "fits" and last["way"] == "" and last["whole"] is None and last["helping"] == []
    assert last["sentence"].startswith("It fits: ") and last["sentence"].endswith(" GiB free on a GPU of 8 GB.")
    assert sum(kind["bytes"] for kind in last["bar"]["kinds"]) == last["bar"]["bytes"] < last["limit"]
    assert last["bar"]["kinds"][0]["words"] == "the model" and "Memory on cuda:0" in last["printed"]
    assert "on a GPU is not estimated" in last["time"]
    assert last["bar"]["phase"].startswith(("while ", "in a step")), "a phase is said in words"


@pytest.mark.slow
def test_what_does_not_fit_at_once_is_said_before_the_way_that_fits(
    model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_run, "MOST_TOGETHER", 1)  # rehearses less
    whole = parts_of({**model, "memory.budget": "20GB"})[0]["bar"]["bytes"]
    first, last = parts_of({**model, "memory.budget": f"{whole // 1000 - 1000}KB", "machine": "gpu-8"})
    assert first["state"] == "searching" and first["sentence"].startswith("With everything in memory it takes ")
    assert last["state"] == "otherwise" and "of the budget of " in last["sentence"] and last["way"].endswith(".")
    assert last["whole"]["bytes"] == whole > last["limit"] >= last["bar"]["bytes"]


@pytest.mark.slow
def test_a_moved_setting_plans_anew_only_what_depends_on_it(
    model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsals of each answer, in what a workbench passes from one process to the next."""
    rehearsed: list[RowShape] = []
    values: dict[str, Any] = {}
    rehearse = forecast_text_run.rehearse

    def counted(*given: Any, **more: Any) -> Any:
        rehearsed.append(more["rows"])
        return rehearse(*given, **more)

    monkeypatch.setattr(forecast_text_run, "rehearse", counted)

    def answer(**moved: str) -> tuple[int, dict[str, Any]]:
        rehearsed.clear()
        settings = {path.replace("__", "."): text for path, text in moved.items()}
        with remembering(values, lambda key, value: pickle.dumps((key, value))):
            last = parts_of({**model, "machine": "gpu-8", **settings})[-1]
        return len(rehearsed), last

    first, before = answer()
    assert first == 1
    counts = {
        "again": answer()[0],
        "learning rate": answer(train__learning_rate="1e-3")[0],
        "epochs": answer(train__epochs="9")[0],
        "larger batch": answer(train__batch_size="64")[0],
        "another GPU": answer(machine="gpu-24")[0],
        "rank": answer(lora__rank="32")[0],
        "rank moved back": answer()[0],
        "moments": answer(train__moments="8bit")[0],
    }
    assert counts == {
        "again": 0, "learning rate": 0, "epochs": 0, "larger batch": 0, "another GPU": 0, "rank": 1, "rank moved back": 0,
        "moments": 1,
    }  # fmt: skip
    number, after = answer()
    assert number == 0 and after == before, "what is remembered is what is computed"
    assert answer(lora__rank="32")[1]["bar"]["bytes"] > before["bar"]["bytes"]


@pytest.mark.slow
def test_settings_that_change_no_shape_change_no_rehearsal(model: dict[str, str]) -> None:
    """Without anything remembered: what is left out of the key changes nothing."""
    moved = {
        "train.epochs": "7", "train.batch_size": "64", "train.learning_rate": "0.1", "train.schedule": "constant",
        "train.warmup_fraction": "0.5", "train.evaluate_every": "3", "train.patience": "1", "train.checkpoint_every": "2",
        "train.keep_checkpoints": "1", "train.seed": "3", "train.rate_trial_steps": "0", "train.length_grouping": "false",
        "train.min_improvement": "0.5", "train.log_to": "tensorboard", "train.steps": "9",
    }  # fmt: skip
    assert {name.removeprefix("train.") for name in moved} | {"micro_tokens"} == set(NO_SHAPES)
    bars = [parts_of({**model, **more, "machine": "gpu-8"})[-1]["bar"] for more in ({}, moved)]
    assert bars[0] == bars[1]


@pytest.mark.slow
def test_rows_are_read_once(model: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    short = [{"prompt": f"word {number}", "completion": "yes"} for number in range(12)]
    rows = write_rows(tmp_path / "rows.jsonl", [*short, {"prompt": "word " * 40, "completion": "no"}])
    read: list[object] = []
    load_dataset = encoded_rows.load_dataset

    def counted(spec: Any, *given: Any, **more: Any) -> Any:
        read.append(spec)
        return load_dataset(spec, *given, **more)

    monkeypatch.setattr(encoded_rows, "load_dataset", counted)
    values: dict[str, Any] = {}
    settings = {"model.path": str(folder), "data.train": str(rows), "machine": "gpu-8", "train.micro_tokens": "256"}

    def answer(**moved: str) -> str:
        with remembering(values, lambda key, value: None):
            return str(parts_of({**settings, **{path.replace("__", "."): text for path, text in moved.items()}})[-1]["time"])

    for moved in ({}, {"train__batch_size": "2"}, {"data__max_tokens": "900"}):
        answer(**moved)
    assert len(read) == 1, "none of the rows is cut"
    answer(data__max_tokens="120")
    assert len(read) == 2
    rows.write_text(rows.read_text() * 2)
    answer()
    assert len(read) == 3


def test_the_code_of_a_model_is_imported_before_processes_are_forked(
    model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers imports it with the class; where that needs no network."""
    imported: list[str] = []
    classes = SimpleNamespace(_model_mapping=defaultdict(lambda: None))
    monkeypatch.setattr(fitting, "auto_class_of", lambda config: imported.append(config.model_type) or classes)
    for path in (model["model.path"], "Qwen/Qwen2.5-7B", "no/such-model"):
        prepare_for({"work": "lorakeet.studio.fitting:fit", "settings": {"model.path": path}})
    assert imported == ["llama", "qwen2"]


@pytest.mark.slow
def test_operators_that_one_plan_met_the_next_one_knows(model: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process: here with nothing known but what was passed on."""
    met: list[object] = []
    dispatch = FakeTensorMode.dispatch

    def counted(mode: FakeTensorMode, func: object, *rest: Any) -> Any:
        met.append(func)
        return dispatch(mode, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    values: dict[str, Any] = {}

    def answer(rank: str) -> int:
        met.clear()
        ledger._KNOWN.clear()
        with remembering(values, lambda key, value: values.update(pickle.loads(pickle.dumps({key: value})))):
            parts_of({**model, "machine": "gpu-8", "lora.rank": rank, "data.max_tokens": "448"})
        return len(met)

    first = answer("14")
    known = len(values[fitting.OPERATORS])
    assert answer("28") < first / 2
    assert len(values[fitting.OPERATORS]) > known


@pytest.mark.slow
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


def test_the_time_of_pictures_is_said_to_be_unknown() -> None:
    result: Any = SimpleNamespace(device=SimpleNamespace(type="cpu"), config=RunConfig(kind="image"))
    assert "of a run on pictures" in time_words(result)

"""The verbs on a machine whose GPU is the simulated card, with model.device auto: each does there what it does on a CPU."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakeet.config import RunConfig, read_run
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.peft import peft
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.free import MARGIN
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.planning.evaluation import Evaluation
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.runs.residency import ALONE, RESIDENT, Way
from lorakeet.serve.engine import Engine
from lorakeet.serve.load_places import LoadPlaces
from lorakeet.serve.registry import Registry
from lorakeet.serve.service import Service
from lorakeet.verbs.chat import chat
from lorakeet.verbs.export import export
from lorakeet.verbs.extract import extract
from lorakeet.verbs.merge import merge
from lorakeet.verbs.options import (
    ChatOptions,
    ExportOptions,
    ExtractOptions,
    MergeOptions,
    QuantizeOptions,
    TuneOptions,
    VerifyOptions,
)
from lorakeet.verbs.quantize import quantize
from lorakeet.verbs.tune import tune
from lorakeet.verbs.verify import verify
from tiny.card_column import same_on_card
from tiny.exports import write_folder
from tiny.family_columns import saved
from tiny.gguf_file import write_tiny_gguf
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, run, settings, write_rows
from tiny.simulated_card import Card, simulated_card
from tiny.site import Site

FEW = {"train.steps": 4, "evaluate.answers": 2, "evaluate.drift_texts": 2, "evaluate.resamples": 100}


@pytest.fixture
def card() -> Iterator[Card]:
    with simulated_card() as found:
        yield found
    assert found.launches["mm"] > 0, "nothing was computed there"


@pytest.mark.slow
def test_merge_and_verify(loud: Path, tmp_path: Path, card: Card) -> None:
    path = Path(shutil.copytree(loud, tmp_path / "run"))
    merged = merge(MergeOptions((str(path),), out=tmp_path / "merged"), console=quiet())
    assert merged.certificate is not None and merged.certificate.passed
    found = verify(VerifyOptions(str(path), against=(str(tmp_path / "merged"),), rows=2), console=quiet())
    assert found.to_mapping()["passed"] is True
    assert any(check.name.endswith("greedy text") for check in read_certificate(path / "certificate.json").checks)


@pytest.mark.slow
def test_export(loud: Path, tmp_path: Path, card: Card) -> None:
    found = export(ExportOptions(str(loud), out=tmp_path / "model.gguf", quant="f16"), console=quiet())
    assert found.to_mapping()["passed"] is True


@pytest.mark.slow
def test_a_gguf_file_is_trained(tmp_path: Path, card: Card) -> None:
    write_tiny_gguf(tmp_path / "base.gguf", "Q4_0", hidden_size=64, intermediate_size=96)
    data = write_rows(tmp_path / "rows.jsonl", reviews(40))
    found = run(tmp_path / "base.gguf", data, tmp_path / "run", FEW)
    assert found.setup.device.type == "cuda" and found.report is not None and found.report.certificate is not None
    assert found.report.certificate.passed


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), [
    ("gpt_oss", {}), ("qwen3_next", {}),
    ("llama", {"model.quantize": "nf4", "lora.variant": "dora", "lora.new_tokens": "<note>"}),
])  # fmt: skip
def test_a_run_is_that_of_the_cpu(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Losses, replies and certificate; every family is tried so by `make families`."""
    if family == "qwen3_next":
        saved(family, tmp_path, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    else:
        save_tiny_llama(tmp_path / "model", family=family)
    same_on_card(tmp_path, changes)


@pytest.mark.slow
def test_serve_over_http(finished: Any, tiny_llama_folder: Path, card: Card) -> None:
    """The server also asks it what its certificate says, of a run on the CPU, before it answers."""
    live = ServingModel(load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32")))
    assert live.text.device.type == "cuda"
    engine = Engine(live.text, live.selection, slots=4, context=128, chunk=32)
    registry = Registry(live, engine, base="base")
    registry.register("a", finished.path / "adapter")
    service = Service(live.text, engine, registry, places=LoadPlaces([], {}))
    engine.start()
    site = Site(service)
    try:
        body = {"prompt": "This drug", "temperature": 0, "max_tokens": 8}
        texts = {}
        for model in ("base", "a"):
            answer = httpx.post(f"{site.url}/v1/completions", json={**body, "model": model}, timeout=120)
            assert answer.status_code == 200, answer.text
            texts[model] = answer.json()["choices"][0]["text"]
        asked = {**body, "model": "a", "stream": True}
        with httpx.stream("POST", f"{site.url}/v1/completions", json=asked, timeout=120) as lines:
            streamed = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
        assert "".join(each["choices"][0]["text"] for each in streamed) == texts["a"] != texts["base"]
    finally:
        site.stop()
        engine.drain(timeout=0.0)


def said_in_chat(loud: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("alder birch\n/both\ncedar\n"))
    options = ChatOptions(target=str(loud / "adapter"), max_tokens=8, temperature=0.0, context=200)
    chat(options, console=Console(file=shown, width=120))
    return shown.getvalue()


@pytest.mark.slow
def test_chat(loud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = said_in_chat(loud, monkeypatch)
    with simulated_card() as card:
        assert said_in_chat(loud, monkeypatch) == expected and "base: " in expected
    assert card.launches["mm"] > 0


@pytest.mark.slow
def test_a_model_that_its_card_cannot_hold_writes_the_same_texts_block_by_block(
    loud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is said: it is far slower. A card that has room for neither refuses before anything is loaded."""
    expected = said_in_chat(loud, monkeypatch)
    with simulated_card() as card:
        config = read_run(loud / "config.yaml")
        work = Evaluation(
            RunConfig(model=replace(config.model, device="auto"), data=DataSpec(max_tokens=200)), read_adapter(loud / "adapter"),
            lambda _: None, Workload(labelled=False), None, 1.0,
        )  # fmt: skip
        whole, least = (work.plan(way).peak for way in (RESIDENT, Way(streamed=True, slots=ALONE)))
        assert least < whole

        def few(peak: int) -> None:
            left = peak - 1 + MARGIN - CONTEXT
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (left, 8 << 30))

        few(whole)
        said = said_in_chat(loud, monkeypatch)
        assert "for writing texts: blocks are streamed from " in said and said.endswith(expected)
        few(least)
        with pytest.raises(ConfigError, match=r"but writing texts takes at least .* Close other programs"):
            said_in_chat(loud, monkeypatch)
    assert card.launches["mm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["extract", "quantize"])
def test_what_its_card_cannot_hold_the_cpu_computes(
    verb: str, tiny_llama_folder: Path, loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models in fp32, or one whole: it is said, and what is written is the same."""
    tuned = write_folder(tiny_llama_folder, peft.read(loud / "adapter"), tmp_path / "tuned")
    data = str(write_rows(tmp_path / "rows.jsonl", reviews(60)))

    def made(out: Path) -> str:
        console = Console(file=(said := io.StringIO()), width=300)
        if verb == "extract":
            extract(ExtractOptions(str(tuned), str(tiny_llama_folder), out=out, rank=8), console=console)
        else:
            given = QuantizeOptions(str(tiny_llama_folder), "gptq", out, group_size=16, calibration=data, calibration_rows=8)
            quantize(given, console=console)
        return said.getvalue()

    with simulated_card() as card:
        assert "The CPU computes" not in made(tmp_path / "there")
        assert card.launches["mm"] > 0
        card.reset()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (MARGIN, 8 << 30))
        said = made(tmp_path / "here")
        assert "The CPU computes the " in said and "more than is free on cuda:0" in said and not card.launches
    one, other = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("there", "here"))
    assert one.keys() == other.keys() and all(torch.allclose(one[name].float(), other[name].float()) for name in one)


@pytest.mark.slow
def test_tune_by_optuna(tiny_llama_folder: Path, tmp_path: Path, card: Card) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reviews(60))
    slow = {**FEW, "train.learning_rate": 0.003, "data.held_out_fraction": 0.3}
    config = settings(tiny_llama_folder, data, tmp_path / "run", slow)
    found = tune(config, TuneOptions(tokens=8000, rank_choices=(2, 4)), console=quiet())
    assert len(found.search.trials) >= 3 and all(trial.loss is not None for trial in found.search.trials)

"""RUN/adapter is a folder that PEFT and model hubs take as it is: a model card, and a base that PEFT finds by itself."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml

from lorakeet.data.pack import pack_examples
from lorakeet.data.split import split_record
from lorakeet.exporting.card import licence_of
from lorakeet.kinds.adapter_card import NAME, write_adapter_card
from lorakeet.models.inject import activate
from lorakeet.runs.open_adapter import open_adapter
from tiny.gguf_file import write_tiny_gguf
from tiny.runs import reviews, run, write_rows

pytestmark = pytest.mark.slow  # they share what takes seconds to make


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids[None]).logits[0])


def same_as_trained(adapter: Path, setup: Any) -> bool:
    """Whether PEFT computes the live adapter's logits from the folder alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of transformers' names
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=torch.float32)
    batch = pack_examples([setup.held_out.examples[0]])
    activate(setup.text.model, "default")
    setup.text.model.eval()
    live = setup.text.head(setup.text.with_options(pad=False).hidden(batch))
    found = logits(loaded, batch.ids)[batch.target_positions]
    return torch.allclose(found, live.detach(), atol=1e-4)


def test_peft_loads_the_base_and_the_adapter_from_the_folder_alone(finished: Any) -> None:
    assert same_as_trained(finished.path / "adapter", finished.result.setup)


def test_a_gguf_file_is_a_base_that_peft_finds_and_keeps_its_name_here(tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    write_tiny_gguf(file)
    data = write_rows(tmp_path / "rows.jsonl", reviews(40))
    found = run(file, data, tmp_path / "run", {"train.steps": 2, "evaluate.drift_texts": 0, "data.chat_template": "off"})
    adapter = tmp_path / "run" / "adapter"
    text = (adapter / NAME).read_text()
    assert "trained on `base.gguf` (a .gguf file)" in text and "plain text, turns joined by" in text and str(file) not in text
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(found.setup.text.source)
    assert same_as_trained(adapter, found.setup)
    shutil.copytree(adapter, tmp_path / "copy")
    assert open_adapter(tmp_path / "copy").config.model.path == str(file), "a folder of the cache may go"


def test_the_card_says_what_was_measured_with_its_intervals_and_on_which_rows(finished: Any) -> None:
    text = (finished.path / "adapter" / NAME).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front and str(finished.model) not in text.partition("## How good")[0], "it is a local folder"
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "text-generation" and "accuracy" in front["metrics"]
    assert "license" not in front and "does not say its licence" in text
    accuracy = next(one for one in finished.result.report.systems if one.role == "adapter").metrics["accuracy"]
    assert f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f} %]" in text
    split = json.loads((finished.path / "split.json").read_text())
    assert split["train_sha256"] in text and split["test_sha256"] in text
    assert "AutoPeftModelForCausalLM" in text and str(finished.path) not in text
    train, outcome = finished.result.setup.config.train, finished.result.outcome
    assert f"learning rate {outcome.learning_rate:g}" in text and f"{outcome.steps} steps of {train.batch_size} rows" in text
    assert "| Prompt format | " in text and str(finished.model) not in text


def test_no_hash_is_stated_of_rows_that_there_are_not(finished: Any, tmp_path: Path) -> None:
    adapter, result = tmp_path / "adapter", finished.result
    shutil.copytree(finished.path / "adapter", adapter)
    record = split_record(result.setup.dataset.train, result.setup.dataset.held_out)
    write_adapter_card(adapter, result.report, result.report.certificate, setup=result.setup, split=record)
    text = (adapter / NAME).read_text()
    assert str(record["train_sha256"]) in text and "Test rows, SHA-256" not in text and str(record["test_sha256"]) not in text


@pytest.mark.parametrize(("licence", "stated"), [("mit", "mit"), ("", None)])
def test_a_licence_is_stated_if_the_base_says_it(licence: str, stated: str | None, finished: Any, tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(finished.path / "adapter", adapter)
    base.mkdir()
    (base / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "A model.")
    assert licence_of(base) == licence
    setup = finished.result.setup
    changed = type("Changed", (), {"config": setup.config, "name": setup.name, "base_folder": base})()
    write_adapter_card(adapter, finished.result.report, finished.result.report.certificate, setup=changed, split={})
    front = yaml.safe_load((adapter / NAME).read_text().split("---")[1])
    assert front.get("license") == stated

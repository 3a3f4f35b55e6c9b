"""`runs.open_adapter`: adapters of runs and of PEFT, opened with the base and the tokenizer that they belong to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.peft import peft
from lorakeet.models.inject import adapter_names
from lorakeet.models.text.load import set_attention
from lorakeet.runs.open_adapter import NAME, open_adapter
from tiny.exports import certified_anew
from tiny.models import save_tiny_llama
from tiny.peft_oracle import by_peft, change_config
from tiny.runs import quiet, reviews, run, write_rows


def test_a_run_brings_its_settings_and_its_adapter(finished: Any) -> None:
    opened = open_adapter(finished.path)
    assert opened.run is not None and opened.folder == finished.path / "adapter" and opened.tokenizer is None
    assert opened.config.data.train == str(finished.data)
    text = opened.text_model(quiet())
    assert adapter_names(text.model) == [NAME] and text.dtype == torch.float32
    assert adapter_names(opened.text_model(quiet(), with_adapter=False).model) == []
    assert opened.text_model(quiet(), dtype="bfloat16").dtype == torch.bfloat16


def test_rows_are_read_once_for_an_adapter_and_its_copies(finished: Any) -> None:
    opened = open_adapter(finished.path)
    first = opened.within("64GiB").dataset
    assert first.train and opened.dataset is first
    other = replace(opened.config, data=replace(opened.config.data, split_seed=1))
    assert replace(opened, config=other).dataset is not first


def test_the_adapter_folder_of_a_run_stands_alone(finished: Any) -> None:
    opened = open_adapter(finished.path / "adapter")
    assert opened.run is None and opened.config.model.path == str(finished.model) and opened.config.data.train == ""


def test_an_adapter_of_peft_computes_here_what_it_does_there(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    theirs = by_peft(tmp_path / "adapter", transformers.AutoModelForCausalLM.from_pretrained(base), target_modules=["v_proj"])
    text = open_adapter(tmp_path / "adapter").text_model(quiet(), dtype="float32")
    set_attention(text.model, "sdpa")
    ids = torch.tensor([[4, 90, 17, 5]])
    with torch.no_grad():
        torch.testing.assert_close(text.model(input_ids=ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def test_the_base_can_be_named_and_must_be_known(finished: Any, tmp_path: Path) -> None:
    assert open_adapter(finished.path, base="elsewhere").config.model.path == "elsewhere"
    settings = tmp_path / "other.yaml"
    settings.write_text("model: third\ndata: other.jsonl\n")
    assert open_adapter(finished.path, config=settings).config.data.train == "other.jsonl"
    peft.write(replace(peft.read(finished.path / "adapter"), base=""), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"does not name its base model.*--base"):
        open_adapter(tmp_path / "adapter")
    assert open_adapter(tmp_path / "adapter", base="named").config.model.path == "named"


def test_where_no_adapter_lies_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_adapter(tmp_path / "none")
    with pytest.raises(DataError, match="holds no adapter"):
        open_adapter(tmp_path)


@pytest.mark.slow
def test_new_tokens_whose_ids_changed_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reviews(20))
    run(tiny_llama_folder, data, tmp_path / "run", {"lora.new_tokens": "<one>,<two>", "train.steps": 1})
    folder = tmp_path / "run" / "adapter"
    opened = open_adapter(folder)
    assert opened.tokenizer == folder
    assert opened.text_model(quiet()).tokenizer.convert_tokens_to_ids(["<one>", "<two>"]) == [320, 321]
    for file in ("tokenizer_config.json", "tokenizer.json"):
        (folder / file).unlink()
    certified_anew(tmp_path / "run")
    text = open_adapter(folder).text_model(quiet())  # the base's tokenizer gives the same ids, so nothing is amiss
    assert text.tokenizer.convert_tokens_to_ids("<two>") == 321
    change_config(folder, trainable_token_indices={"embed_tokens": [321, 320]})
    certified_anew(tmp_path / "run")
    with pytest.raises(DataError, match=r"<one>, <two>.*have the ids \(321, 320\), but the tokenizer gives them \(320, 321\)"):
        open_adapter(folder).text_model(quiet())
    assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]


def test_a_budget_is_the_runs_or_the_one_given(finished: Any) -> None:
    opened = open_adapter(finished.path)
    assert opened.within(None) is opened and not opened.config.memory.limit
    assert opened.within("8GiB").config.memory.limit.bytes == 8 << 30
    with pytest.raises(ConfigError, match="without a unit"):
        opened.within("8")

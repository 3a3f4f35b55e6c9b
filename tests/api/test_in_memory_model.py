"""A transformers model in memory is saved once, and then used as its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorakeet as lk
from lorakeet.errors import ConfigError
from lorakeet.models.text.load import load_tokenizer
from tiny.models import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))


def test_it_generates_as_its_folder(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    model, folder = lk.load(own, dtype="float32"), lk.load(tiny_llama_folder, dtype="float32")
    assert model.generate("alder birch", max_tokens=8) == folder.generate("alder birch", max_tokens=8)
    assert lk.load(own).spec.path == model.spec.path, "the same model again is not written again"
    other = load_tokenizer(tiny_llama_folder)
    other.chat_template = "{{ messages[0].content }}!"
    assert lk.load(own, tokenizer=other).spec.path != model.spec.path, "another template is another folder"
    lk.attach(own, lk.Lora(rank=2))
    with pytest.raises(ConfigError, match=r"carries adapters of lk\.attach"):
        lk.load(own)
    lk.detach(own)
    with torch.no_grad():
        own.model.norm.weight.mul_(1.5)
    assert lk.load(own).spec.path != model.spec.path
    named = lk.load(own, folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").is_file() and named.spec.path == str(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"mine, which exists already"):
        lk.load(own, folder=tmp_path / "mine")
    model.release()
    folder.release()


def test_what_cannot_be_saved_is_named(tiny_llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer beside it. Give one: lk.load\(model, tokenizer=…\)"):
        lk.load(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"are on device meta, without numbers: model.embed_tokens.weight"):
        lk.load(tiny_model("llama").to("meta"), tokenizer=load_tokenizer(tiny_llama_folder))
    with pytest.raises(ConfigError, match=r"model is Linear\(.* \(Linear\); expected a name, a path, or a transformers model"):
        lk.load(nn.Linear(2, 2))
    tokenizer = load_tokenizer(tiny_llama_folder)
    assert Path(lk.load(tiny_model("llama"), tokenizer=tokenizer).spec.path).is_dir()
    from peft import LoraConfig, inject_adapter_in_model

    carrying = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"carries adapters of PEFT. Take them with lk.from_peft"):
        lk.load(carrying, tokenizer=tokenizer)

"""A dense folder cast while it is read is the model that transformers makes of it, and holds no page of its files meanwhile."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3_5Config, core_model_loading

from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models.files.dense import AT_ONCE, load_dense
from lorakeet.models.text.load import read_config
from tiny.models import FAMILIES, save_tiny_llama


def mapped(folder: Path) -> bool:
    """Whether this process has a page of a weight file of the folder in its reach."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return any(str(folder.resolve()) in line and line.endswith(".safetensors") for line in lines)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Every tensor that is read from a file, with whether its folder was mapped just then."""
    found: list[tuple[str, bool]] = []
    own: Callable[[SafeFile, str], torch.Tensor] = SafeFile.read

    def read(self: SafeFile, name: str) -> torch.Tensor:
        found.append((name, mapped(self.path.parent)))
        return own(self, name)

    monkeypatch.setattr(SafeFile, "read", read)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_cast_is_transformers_own_model(tmp_path: Path, family: str, shards: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "whole", family=family))
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    model.generation_config = GenerationConfig(temperature=0.3, do_sample=True, max_length=7)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "50GB")
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    found = load_dense(folder, read_config(folder), torch.bfloat16)
    assert type(found) is type(wanted) and not found.training
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards > 1)
    theirs, ours = wanted.state_dict(), found.state_dict()
    assert list(theirs) == list(ours)
    assert all(theirs[name].dtype == ours[name].dtype and torch.equal(theirs[name], ours[name]) for name in theirs)
    assert [name for name, _ in wanted.named_parameters()] == [name for name, _ in found.named_parameters()], "tied weights"
    assert all(torch.equal(held, found.get_buffer(name)) for name, held in wanted.named_buffers())
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert found.name_or_path == found.config.name_or_path == str(folder)
    assert {**wanted.config.to_dict(), "_name_or_path": ""} == {**found.config.to_dict(), "_name_or_path": ""}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_no_file_is_mapped_while_it_is_cast(tmp_path: Path, reads: list[tuple[str, bool]]) -> None:
    save_tiny_llama(tmp_path)  # a folder of its own: a model of another test may still have its file mapped
    model = load_dense(tmp_path, read_config(tmp_path), torch.bfloat16)
    assert len(reads) >= len(list(model.parameters())) and not any(there for _, there in reads)
    assert not mapped(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_weights_that_stay_as_they_are_stay_pages_of_their_file(tiny_llama_folder: Path, reads: list[Any]) -> None:
    model = load_dense(tiny_llama_folder, read_config(tiny_llama_folder), torch.float32)
    assert not reads and mapped(tiny_llama_folder), type(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_model_within_a_larger_configuration(tmp_path: Path, dtype: torch.dtype) -> None:
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 64, "layer_types": ["full_attention", "full_attention"],
    }  # fmt: skip
    config = Qwen3_5Config(text_config=text)
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(tmp_path)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    model = load_dense(tmp_path, read_config(tmp_path), dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in model.named_parameters() if name in stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_beside_the_model_stays_out_of_it(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny_llama(tmp_path)
    plain = load_dense(folder, read_config(folder), dtype)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(folder)
    assert (folder / "adapter_config.json").is_file()
    found = load_dense(folder, read_config(folder), dtype)
    assert list(found.state_dict()) == list(plain.state_dict())


def test_no_more_is_read_at_once_than_is_planned(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert core_model_loading.GLOBAL_WORKERS <= AT_ONCE
    now, most, own = [0], [0], SafeFile.read

    def read(self: SafeFile, name: str) -> torch.Tensor:
        now[0] += 1
        most[0] = max(most[0], now[0])
        tensor = own(self, name)
        time.sleep(0.002)
        now[0] -= 1
        return tensor

    monkeypatch.setattr(SafeFile, "read", read)
    load_dense(tiny_llama_folder, read_config(tiny_llama_folder), torch.bfloat16)
    assert 1 <= most[0] <= AT_ONCE


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        load_dense(tmp_path, read_config(tmp_path), torch.bfloat16)


def test_a_broken_generation_config_is_no_broken_model(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    assert load_dense(tmp_path, read_config(tmp_path), torch.bfloat16).can_generate()


def test_a_file_that_became_shorter_is_no_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path)

    def read(self: SafeFile, name: str) -> torch.Tensor:
        raise DataError(f"{self.path} became shorter while it was read. Fetch the file again.")

    monkeypatch.setattr(SafeFile, "read", read)
    with pytest.raises(DataError, match="became shorter"):
        load_dense(tmp_path, read_config(tmp_path), torch.bfloat16)

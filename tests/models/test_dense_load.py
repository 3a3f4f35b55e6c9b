"""A dense folder cast while it is read is the model that transformers makes of it, and holds no page of its files meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lorakeet.errors import DataError
from lorakeet.formats.safe import SafeFile
from lorakeet.models.dense_load import load_dense
from lorakeet.models.load import read_config
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


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_no_file_is_mapped_while_it_is_cast(tiny_llama_folder: Path, reads: list[tuple[str, bool]]) -> None:
    model = load_dense(tiny_llama_folder, read_config(tiny_llama_folder), torch.bfloat16)
    assert len(reads) >= len(list(model.parameters())) and not any(there for _, there in reads)
    assert not mapped(tiny_llama_folder)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_weights_that_stay_as_they_are_stay_pages_of_their_file(tiny_llama_folder: Path, reads: list[Any]) -> None:
    model = load_dense(tiny_llama_folder, read_config(tiny_llama_folder), torch.float32)
    assert not reads and mapped(tiny_llama_folder), type(model)


def test_a_broken_generation_config_is_no_broken_model(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    assert load_dense(tmp_path, read_config(tmp_path), torch.bfloat16).can_generate()


def test_a_file_that_became_shorter_is_no_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path)

    def read(self: SafeFile, name: str) -> torch.Tensor:
        raise DataError(f"{self.path} became shorter while it was read. Fetch the file again.")

    monkeypatch.setattr(SafeFile, "read", read)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_dense(tmp_path, read_config(tmp_path), torch.bfloat16)

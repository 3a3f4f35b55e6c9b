"""What a model folder holds is found from headers alone, and read when it is called for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models.files.stored_tensors import READERS, dense_model, method_of, stored_quantisation, tensor_files
from lorakeet.verbs.options import QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.runs import quiet


@pytest.fixture
def folder(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def test_shards_are_found_through_their_index(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 2
    stored_model = dense_model(tensor_files(folder))
    assert len(stored_model.dense) == 21 and not stored_model.packed
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert torch.equal(stored_model.dense[name](), load_file(folder / index["weight_map"][name])[name])
    index["weight_map"]["lost"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="such as lost"):
        tensor_files(folder)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_packed_folder_promises_its_layers_and_reads_none(
    method: str, folder: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    quantize(QuantizeOptions(str(tiny_llama_folder), method=method, out=packed), console=quiet())  # type: ignore[arg-type]
    stored = stored_quantisation(AutoConfig.from_pretrained(packed))
    assert stored is not None and method_of(stored) == method
    with monkeypatch.context() as patch:
        patch.setattr(SafeFile, "read", lambda self, name: pytest.fail(f"{name} was read"))
        stored_model = READERS[str(stored["quant_method"])](tensor_files(packed), stored)
    name = "model.layers.0.mlp.up_proj.weight"
    assert len(stored_model.packed) == 14 and name in stored_model.packed and "model.embed_tokens.weight" in stored_model.dense
    dense = load_file(tiny_llama_folder / "model.safetensors")[name]
    assert stored_model.packed[name]().shape == dense.shape


def test_a_plain_model_has_no_stored_quantisation(folder: Path) -> None:
    assert stored_quantisation(AutoConfig.from_pretrained(folder)) is None and method_of({}) == ""


def test_an_index_that_leads_out_of_the_folder_is_refused_before_the_file_is_opened(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    (folder / file).rename(folder.parent / "stolen.safetensors")
    index["weight_map"] = {name: "../stolen.safetensors"}
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"names files outside of its folder: \.\./stolen\.safetensors"):
        tensor_files(folder)

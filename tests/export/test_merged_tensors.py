"""Tensors of a base with an adapter merged in are those that a merge writes, and those of the base."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakeet.export.merged_tensors import MergedTensors
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.merge.merged_folder import merge_into
from tiny.adapters import random_adapter
from tiny.models import tiny_model


def test_each_tensor_is_that_of_the_merge(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapter = random_adapter(model, "q_proj")
    merge_into(tmp_path / "base", adapter, tmp_path / "merged")
    tensors, written = MergedTensors(tmp_path / "base", adapter), open_safetensors(tmp_path / "merged" / "model.safetensors")
    assert set(tensors.names) == set(written.tensors)
    before = dict(model.state_dict())
    for name in tensors.names:
        assert torch.equal(tensors.fetch(name), written.read(name)) and torch.equal(tensors.rows(name)[:], written.read(name))
        assert torch.equal(tensors.fetch(name, folded=False), before[name])
        assert tensors.changes(name) is ("q_proj" in name) and tensors.shape(name) == written.tensors[name].shape

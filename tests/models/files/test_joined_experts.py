"""Experts that published folders have in FP8, int8 or int4, one by one, stay packed as stacks: their numbers are the files'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.data.pack import pack_examples
from lorakeet.errors import DataError
from lorakeet.merging.dequantise import open_dequantised
from lorakeet.models.files.joined_experts import joined_stacks
from lorakeet.models.files.packing import packing_of
from lorakeet.models.files.quantized import packable_stacks, skeleton
from lorakeet.models.files.stored_tensors import stored_quantisation, tensor_files
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack
from tiny.family_columns import rows, saved
from tiny.float_folders import fp8_folder, int8_folder, words_folder


def loaded(folder: Path, store: Path | None = None) -> TextModel:
    return load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda line: None, store=store)


FOLDERS: dict[str, Callable[[Path, Path], Path]] = {
    "blocks": partial(fp8_folder, block=(16, 32)),
    "a scale a matrix": partial(fp8_folder, block=None),
    "int8": int8_folder,
    "int4": words_folder,
    "int4 with zero points": partial(words_folder, symmetric=False),
}


@pytest.mark.parametrize("how", FOLDERS)
def test_they_stay_packed_with_the_numbers_of_the_files(how: str, tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path)
    folder = FOLDERS[how](source, tmp_path / "packed")
    text = loaded(folder)
    stacks = {path: module for path, module in text.model.named_modules() if isinstance(module, PackedStack)}
    assert len(stacks) == 2 * len(text.model.model.layers)
    files = open_dequantised(folder)
    for path, stack in stacks.items():
        block, _, name = path.rpartition(".")
        for number in range(len(stack)):
            parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
            wanted = torch.cat([files.read(f"{block}.{number}.{part}.weight").float() for part in parts])
            assert torch.equal(stack.matrix(number).dense(), wanted), (path, number)
    packed = {path: module.base.settings for path, module in text.model.named_modules() if isinstance(module, PackedLinear)}
    packed |= {path: stack.settings for path, stack in stacks.items()}
    config = read_config(folder)
    planned = packing_of(skeleton(config), config, QuantSpec(), folder)
    assert {path: {**own, "shape": list(own["shape"])} for path, own in planned.items()} == packed
    batch = pack_examples(rows())
    with torch.no_grad():
        found = text.hidden(batch)
        assert torch.equal(loaded(folder, tmp_path / "store").hidden(batch), found)
        dense = {name: files.read(name).float().contiguous() for name in load_file(source / "model.safetensors")}
        save_file(dense, source / "model.safetensors", metadata={"format": "pt"})
        torch.testing.assert_close(found, loaded(source).hidden(batch), rtol=1e-4, atol=1e-5)


def test_parts_that_end_within_a_block_are_joined_dense(tmp_path: Path) -> None:
    """Of 96 rows in blocks of 40 the last ends within its third block, so the rows of the next cannot go on there."""
    folder = fp8_folder(saved("qwen3_moe", tmp_path), tmp_path / "packed", block=(40, 32))
    config = read_config(folder)
    model, stored = skeleton(config), stored_quantisation(config)
    assert stored is not None and joined_stacks(model, packable_stacks(model), tensor_files(folder), stored) == {}
    text = loaded(folder)
    assert not any(isinstance(module, PackedStack) for module in text.model.modules())
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    assert name in load_file(folder / "model.safetensors")
    wanted = open_dequantised(folder).read(name).float()
    assert torch.equal(text.model.model.layers[0].mlp.experts.down_proj[1], wanted)


def test_words_whose_columns_are_not_in_order_are_joined_dense(tmp_path: Path) -> None:
    """Each matrix has an order of its own then, and rows below one another share one."""
    folder = words_folder(saved("qwen3_moe", tmp_path), tmp_path / "packed")
    tensors, path = load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.1.up_proj.weight"
    for name in [name.removesuffix("_packed") for name in tensors if "layers.0.mlp.experts" in name and "_packed" in name]:
        if "down_proj" not in name:
            order = torch.arange(64) // 16
            tensors[f"{name}_g_idx"] = (order.flip(0) if "up_proj" in name else order).int()
    save_file(tensors, folder / "model.safetensors")
    config = read_config(folder)
    model, stored = skeleton(config), stored_quantisation(config)
    assert stored is not None
    found = set(joined_stacks(model, packable_stacks(model), tensor_files(folder), stored))
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert stack not in found and "model.layers.0.mlp.experts.down_proj" in found
    wanted = open_dequantised(folder).read(path).float()
    assert torch.equal(loaded(folder).model.get_parameter(stack)[1][-len(wanted) :], wanted)


def test_an_expert_of_other_columns_than_the_model_s_is_named(tmp_path: Path) -> None:
    folder = words_folder(saved("qwen3_moe", tmp_path), tmp_path / "packed")
    tensors, path = load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.1.up_proj.weight"
    save_file({**tensors, f"{path}_shape": torch.tensor([96, 63])}, folder / "model.safetensors")  # as many words
    with pytest.raises(DataError, match="A matrix of an expert is 96×63; expected 64 columns"):
        loaded(folder)

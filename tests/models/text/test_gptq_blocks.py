"""GPTQ block by block over tiny models: which layers, with which inputs, and what is refused before the first block."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack_examples
from lorakeet.errors import ConfigError, DataError
from lorakeet.memory.spill import Spill
from lorakeet.models.modules import block_prefix, find
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.gptq_blocks import CalibrationStates, check_layers, quantise_blocks
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.quant.packed import PackedLinear
from tiny.models import save_tiny_llama

LAYOUT = GptqLayout(4, 16)


def rows(count: int = 12, length: int = 40) -> list[Example]:
    chance = np.random.default_rng(0)
    supervised = np.ones(length, bool)
    supervised[0] = False
    return [Example(chance.integers(4, 90, length), supervised, str(number), None, False) for number in range(count)]


def loaded(folder: Path, **settings: Any) -> TextModel:
    return load_text_model(ModelSpec(path=str(folder), dtype="float32", products="float32", **settings), say=lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_each_block_sees_what_the_quantised_ones_before_it_make(family: str, attention: str, tmp_path: Path) -> None:
    """The errors reported are those of each layer on the inputs that it has in the finished model."""
    folder = save_tiny_llama(tmp_path / "model", family=family)
    blocks = list(quantise_blocks(loaded(folder, attention=attention), rows(), LAYOUT, micro_tokens=100))
    bases = {path: base for block in blocks for path, base in block.layers.items()}
    errors = {path: error for block in blocks for path, error in block.errors.items()}
    dense, finished = loaded(folder), loaded(folder)
    layers = [path for path, module in dense.model.named_modules() if path in bases]
    linear = {path for path, module in dense.model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert set(layers) == set(bases) == {path for path in linear if "head" not in path}
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in bases}
    for path, base in bases.items():
        module = finished.model.get_submodule(path)
        layer = PackedLinear(base, module.bias, transposed=type(module).__name__ == "Conv1D")
        layer.register_forward_pre_hook(lambda module, args, path=path: seen[path].append(args[0].flatten(0, -2)))
        finished.model.set_submodule(path, layer)
    watched = finished.with_every_token()
    with torch.no_grad():
        for row in rows():
            watched.hidden(pack_examples([row]))
    for path, base in bases.items():
        weight = dense.model.get_submodule(path).weight
        weight = weight.t() if family == "gpt2" else weight
        x = torch.cat(seen[path])
        found = float((x @ (weight - base.dense()).T).norm() / (x @ weight.T).norm())
        assert errors[path] == pytest.approx(found, rel=1e-3) and 0 < found < 0.2


def test_blocks_that_are_done_leave_the_model(tiny_llama_folder: Path) -> None:
    text = loaded(tiny_llama_folder)
    before = sum(parameter.numel() for parameter in text.model.parameters())
    sizes = [sum(parameter.numel() for parameter in text.model.parameters()) for _ in quantise_blocks(text, rows(), LAYOUT)]
    assert before > sizes[0] > sizes[1]


def test_nothing_is_spilled_for_a_block_that_does_not_come(tiny_llama_folder: Path) -> None:
    put: list[int] = []

    class Counted(Spill):
        def put(self, key: Any, tensor: torch.Tensor) -> None:
            put.extend([1] * (key != "H"))  # each stage's, which every block has
            super().put(key, tensor)

    counts = []
    for block in quantise_blocks(loaded(tiny_llama_folder), rows(12), LAYOUT, micro_tokens=120, spill=Counted):
        counts.append(len(put))
        assert block.count == 2
    assert counts[0] > 4 and counts[1] == counts[0]


def test_layers_that_do_not_fit_are_counted_and_the_first_ones_named(tiny_llama_folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        next(quantise_blocks(loaded(tiny_llama_folder), rows(), GptqLayout(4, 32)))
    said = str(caught.value)
    assert said.startswith("2 layers (model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj): 48 inputs, no multiple of the")
    assert "q_proj" not in said and "\n" not in said


def test_many_layers_of_a_shape_are_one_line() -> None:
    layers: dict[str, nn.Module] = {f"layers.{number}.down_proj": nn.Linear(48, 32) for number in range(200)}
    layers |= {"layers.7.q_proj": nn.Linear(80, 32)}
    with pytest.raises(ConfigError) as caught:
        check_layers(layers, GptqLayout(4, 32))
    first, second = str(caught.value).splitlines()[1:]
    named = ", ".join(f"layers.{number}.down_proj" for number in range(3))
    assert f"200 layers ({named} and 197 more): 48 inputs, no multiple of the group size 32" in first
    assert "1 layer (layers.7.q_proj): 80 inputs" in second


def test_too_few_tokens_are_counted(tiny_llama_folder: Path) -> None:
    with pytest.raises(DataError, match="have 40 tokens, but the widest layer has 48 inputs"):
        next(quantise_blocks(loaded(tiny_llama_folder), rows(1), LAYOUT))


def batches() -> list[Batch]:
    chance = np.random.default_rng(0)

    def row(number: int, length: int) -> Example:
        return Example(chance.integers(4, 90, length), np.arange(length) > 0, str(number), None, False)

    return [pack_examples([row(0, 9), row(1, 5)]), pack_examples([row(2, 12)])]


def model(folder: Path, family: str) -> tuple[TextModel, nn.ModuleList]:
    spec = ModelSpec(path=str(save_tiny_llama(folder, family=family)), dtype="float32", products="float32")
    text = load_text_model(spec, say=lambda line: None)
    return text, cast(nn.ModuleList, find(text.model, block_prefix(text.model, text.family)[0]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_get_and_give_what_they_do_in_the_model(family: str, on_disk: bool, tmp_path: Path) -> None:
    text, blocks = model(tmp_path / "model", family)
    seen: list[list[torch.Tensor]] = [[] for _ in blocks]
    handles = [
        block.register_forward_pre_hook(lambda module, args, number=number: seen[number].append(args[0].clone()))
        for number, block in enumerate(blocks)
    ]
    watched = text.with_every_token()
    with torch.no_grad():
        for batch in batches():
            watched.hidden(batch)
    for handle in handles:
        handle.remove()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    originals = list(blocks)
    passages = CalibrationStates(text, blocks, batches(), lambda: Spill(scratch if on_disk else None))
    assert list(blocks) == originals and passages.count == 2
    with torch.no_grad():
        for number, block in enumerate(blocks):
            for batch in range(2):
                assert torch.equal(passages.states(batch), seen[number][batch])
            passages.advance(block, number)
    passages.close()
    assert list(scratch.iterdir()) == []


def test_a_tensor_that_every_block_gets_is_kept_once(tmp_path: Path) -> None:
    text, blocks = model(tmp_path / "model", "llama")
    places: list[Spill] = []

    def place() -> Spill:
        places.append(Spill())
        return places[-1]

    CalibrationStates(text, blocks, batches(), place)
    states, behind, shared = (len(spill._tensors) for spill in places)
    assert (states, behind) == (2, 0)
    assert 2 * 2 <= shared < 2 * 2 * len(blocks)  # cosines and sines at least, of each batch, and not of each block

"""What goes into blocks on calibration rows: recorded without running one, handed on, the same from memory and from disk."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack_examples
from lorakeet.memory.spill import Spill
from lorakeet.models.modules import block_prefix, find
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.calibration import CalibrationStates
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from tiny.models import save_tiny_llama


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

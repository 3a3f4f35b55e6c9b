"""Blocks that stand aside: what they hand on, what they record, and that they are taken out again."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lorakeet.memory.spill import Spill
from lorakeet.models.frozen_prefix import FrozenPrefix


class Block(nn.Module):
    """Adds one, and counts its calls."""

    attention_type = "full"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, states: Tensor) -> Tensor:
        self.calls += 1
        return states + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        for block in self.blocks:
            states = block(states)
        return states


def prefixed() -> tuple[Model, list[Block], FrozenPrefix]:
    model = Model()
    blocks = [cast(Block, block) for block in model.blocks]
    return model, blocks, FrozenPrefix(model, [f"blocks.{number}" for number in range(3)], 2, Spill())


def test_given_states_stand_for_the_blocks_below() -> None:
    model, blocks, prefix = prefixed()
    with prefix.returning(torch.full((1, 2, 1), 10.0)):
        assert model(torch.zeros(1, 2, 1)).flatten().tolist() == [11, 11]
    assert [block.calls for block in blocks] == [0, 0, 1]
    assert model(torch.zeros(1, 2, 1)).flatten().tolist() == [3, 3]


def test_the_input_of_the_first_block_above_is_recorded_and_no_block_above_computes() -> None:
    model, blocks, prefix = prefixed()
    with prefix.recording() as found:
        model(torch.zeros(1, 2, 1))
    assert [states.flatten().tolist() for states in found] == [[2, 2]]
    assert [block.calls for block in blocks] == [1, 1, 0]


def test_rows_come_back_by_their_ids_with_a_shared_beginning_once() -> None:
    _, _, prefix = prefixed()
    ids, states = torch.tensor([7, 1, 2, 7, 3]), torch.arange(5.0)[:, None]
    prefix.add(ids, (3, 2), states)
    assert prefix.bytes == 5 * 4
    found = prefix.states_of(torch.tensor([7, 3, 7, 1, 2]), (2, 3), 1)
    assert found is not None and found.flatten().tolist() == [3, 4, 1, 2]
    assert prefix.states_of(torch.tensor([7, 4]), (2,), 0) is None, "another row"

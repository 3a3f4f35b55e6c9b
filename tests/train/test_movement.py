"""Which tensors moved: seen to the bit, each expert on its own, and through a cut of ranks."""

from __future__ import annotations

import torch

from lorakeet.train.movement import StartValues


def test_one_bit_is_a_move_and_nothing_is_none() -> None:
    parameters = {"x.A": torch.randn(2, 3), "x.B": torch.zeros(4, 2), "bf16.A": torch.ones(2, 2, dtype=torch.bfloat16)}
    start = StartValues.of(parameters)
    assert start.moved(parameters) == {"x.A": (False,), "x.B": (False,), "bf16.A": (False,)}
    parameters["x.A"][1, 2] = torch.nextafter(parameters["x.A"][1, 2], torch.tensor(9.0))
    parameters["x.B"][0, 0] = 1e-30
    parameters["bf16.A"][0, 0] = 0
    assert start.moved(parameters) == {"x.A": (True,), "x.B": (True,), "bf16.A": (True,)}


def test_each_expert_of_a_stack_counts_on_its_own() -> None:
    parameters = {"experts.up.B": torch.zeros(3, 4, 2), "conv.A": torch.randn(2, 3, 3, 3)}
    start = StartValues.of(parameters)
    parameters["experts.up.B"][1, 0, 0] = 1
    assert start.moved(parameters) == {"experts.up.B": (False, True, False), "conv.A": (False,)}

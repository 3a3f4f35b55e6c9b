"""What goes from the host to a device goes without anyone waiting for it, small things together."""

from __future__ import annotations

import numpy as np
import torch

from lorakeet.kernels.host_copies import to_device, together_on
from tiny.simulated_card import simulated_card


def test_no_one_waits_for_what_goes_from_the_host_to_a_gpu() -> None:
    with simulated_card() as card:
        there = to_device(torch.arange(5), "cuda:0")
        assert there.is_cuda and not card.waits and card.copies == {"to the card": 40}
        assert to_device(there, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]
        assert [wait.kind for wait in card.waits] == ["a copy to the host"]
    numbers = torch.arange(5)
    assert to_device(numbers, "cpu") is numbers


def test_several_arrays_go_over_at_once() -> None:
    arrays = [np.arange(3, dtype=np.int32), np.zeros((2, 2), np.int32), np.zeros(0, np.int32)]
    with simulated_card() as card:
        found = together_on(arrays, torch.device("cuda", 0))
        assert card.copies == {"to the card": 28} and not card.waits
        assert [each.cpu().tolist() for each in found] == [each.tolist() for each in arrays]
        assert {each.dtype for each in found} == {torch.int32}
    here = together_on(arrays, torch.device("cpu"))
    assert [each.tolist() for each in here] == [each.tolist() for each in arrays]

"""What stands for another device goes that device's way, and only for so long."""

from __future__ import annotations

import torch

from lorakeet.kernels.device import is_cpu, standing_for

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def test_the_cpu_stands_for_itself_outside_a_rehearsal() -> None:
    assert is_cpu(CPU) and not is_cpu(CARD)
    with standing_for(CARD):
        assert not is_cpu(CPU)
        with standing_for(CPU):
            assert is_cpu(CPU)
        assert not is_cpu(CPU)
    assert is_cpu(CPU)

"""Which tensors the C operators support."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from torch import Tensor

from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.compile import why_not
from tiny.native import needs_native

pytestmark = needs_native


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(
    ("states_given", "supported"),
    [
        (lambda: [numbers(4, 32)], True),
        (lambda: [torch.nn.Parameter(numbers(4, 32))], True),
        (lambda: [numbers(4, 24)], False),
        (lambda: [numbers(4, 32).float()], False),
        (lambda: [numbers(4, 64)[:, :32]], False),
        (lambda: [numbers(4, 32), numbers(4, 32).half()], False),
        (lambda: [torch.empty(4, 32, dtype=torch.bfloat16, device="meta")], False),
    ],
)
def test_c_supports_contiguous_bf16_of_whole_lanes(states_given: Callable[[], list[Tensor]], supported: bool) -> None:
    assert not why_not()
    assert operators.supports(*states_given()) is supported
    with operators.torch_only():
        assert not operators.supports(*states_given())


def test_leaving_them_out_is_of_one_thread() -> None:
    found: list[bool] = []
    with operators.torch_only():
        other = Thread(target=lambda: found.append(operators.supports(numbers(4, 32))))
        other.start()
        other.join()
        found.append(operators.supports(numbers(4, 32)))
    assert found == [True, False]

"""Stacked matrices are those that are packed alone, and transformers' own code of experts indexes them as its parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lorakeet.quant.construct import empty_stack, quantise_stack, quantise_weight, weights_in
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack

SPECS = [QuantSpec("nf4"), QuantSpec("nf4", double_quant=False), QuantSpec("int8")]


def weight() -> Tensor:
    return torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.2])[:, None, None]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_matrix_is_the_one_that_is_packed_alone(spec: QuantSpec) -> None:
    stack = quantise_stack(weight(), spec)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    for number, matrix in enumerate(weight()):
        alone = quantise_weight(matrix, spec)
        assert torch.equal(stack.matrix(number).dense(), alone.dense()) and torch.equal(stack[number], alone.dense())
        assert torch.equal(stack.matrix(number).matmul(x), alone.matmul(x))
    assert torch.equal(stack.dense(), torch.stack([stack[torch.tensor(number)] for number in range(3)]))
    assert len(stack) == 3 and stack.shape == (3, 24, 40) and stack.bytes == sum(
        quantise_weight(matrix, spec).bytes for matrix in weight()
    )
    assert weights_in(nn.ModuleDict({"stack": stack})) == 3 * 24 * 40


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_its_settings_and_tensors_make_it_again(spec: QuantSpec) -> None:
    stack = quantise_stack(weight(), spec)
    again = empty_stack(stack.settings)
    again.load_state_dict(stack.state_dict())
    assert torch.equal(again.dense(), stack.dense()) and again.settings == stack.settings


def test_it_takes_the_place_of_a_parameter() -> None:
    """Its dtype and orientation; casts change what it unpacks to, and not its codes."""
    stack = quantise_stack(weight(), SPECS[0])
    stack.stand_for(torch.empty(0, dtype=torch.bfloat16), transposed=True)
    assert stack[1].dtype == stack.dtype == torch.bfloat16
    assert torch.equal(stack[1], stack.matrix(1).dense().t().bfloat16())
    copied = copy.deepcopy(stack).float()
    assert copied.dtype == torch.float32 and copied.absmax.dtype == torch.uint8 and copied.mean.dtype == torch.float32
    assert torch.equal(copied[1], stack.matrix(1).dense().t())
    assert copied.to("meta").device.type == "meta" and stack.device.type == "cpu"


def test_matrices_packed_in_different_ways_make_no_stack() -> None:
    bases = [quantise_weight(weight()[0], spec) for spec in SPECS]
    with pytest.raises(ValueError, match="in different ways"):
        PackedStack.of(bases)

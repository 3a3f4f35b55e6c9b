"""Products with weights in panels: those of the plain weight, each token's to the last bit whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.kernels.choose import C_PANELS, inference_layout
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.panels import PanelGroup, Panels
from tiny.native import needs_native

pytestmark = needs_native


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("outputs", "width"), [(16, 2), (64, 64), (7, 34), (200, 66), (65, 128), (1, 2)])
@pytest.mark.parametrize("tokens", [*range(1, 18), 33, 100])
def test_products_are_those_of_the_plain_weight(tokens: int, outputs: int, width: int) -> None:
    weight, x = numbers(outputs, width), numbers(tokens, width, seed=1)
    panels = Panels(weight)
    assert torch.equal(panels.dense(), weight)
    exact = x.double() @ weight.double().T
    found = panels.product(x)
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    unit = torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-5 * width**0.5  # rounded once, from sums in fp32
    assert bool(((found.double() - exact).abs() <= unit).all())


def test_a_token_gets_the_same_bits_beside_any_others() -> None:
    panels, x = Panels(numbers(150, 48)), numbers(37, 48, seed=1)
    whole = panels.product(x)
    for count in range(1, 37):
        assert torch.equal(panels.product(x[:count]), whole[:count])


def test_weights_beside_each_other_are_one_call() -> None:
    weights, x = [numbers(outputs, 32, seed=outputs) for outputs in (70, 5, 33)], numbers(9, 32)
    panels = [Panels(weight) for weight in weights]
    beside = PanelGroup(panels)
    found = beside.product(x)
    assert found.shape == (9, 108)
    for part, one in zip(found.split(beside.outputs, dim=1), panels, strict=True):
        assert torch.equal(part, one.product(x))


def test_numbers_that_are_none_stay_in_their_row() -> None:
    x = numbers(3, 32)
    x[1, 5] = float("nan")
    found = Panels(numbers(40, 32)).product(x)
    assert bool(found[1].isnan().all()) and bool(found[[0, 2]].isfinite().all())


def test_what_the_library_does_not_take() -> None:
    weight = numbers(16, 32)
    assert inference_layout(weight) is C_PANELS
    for other in (weight.float(), numbers(16, 33), weight.to("meta")):
        assert inference_layout(other) is not C_PANELS
    with operators.torch_only():
        assert inference_layout(weight) is not C_PANELS
    panels = Panels(weight)
    for wrong in (numbers(2, 30), numbers(2, 32).float(), numbers(32)):
        with pytest.raises(ValueError, match=r"the weights take \(tokens, 32\) in bfloat16"):
            panels.product(wrong)
    apart = numbers(2, 64)[:, ::2]
    assert torch.equal(panels.product(apart), panels.product(apart.contiguous()))
    assert panels.product(numbers(0, 32)).shape == (0, 16)

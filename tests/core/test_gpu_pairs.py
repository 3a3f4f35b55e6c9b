"""Pairs on a card: the products of torch part by part, copies made once a pass, and one launch for each product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.core.gpu_pairs import wide_mm
from lorakeet.core.pair_products import PairProducts, PairSpan
from tiny.simulated_card import Card

WIDTH, OUTPUTS, TOKENS = 64, (32, 96), 50
PLACES = {
    "one input": [PairSpan(0, TOKENS, 3.0), PairSpan(0, TOKENS, 3.0, 1)],
    "scales differ": [PairSpan(0, TOKENS, 3.0), PairSpan(0, TOKENS, 0.5, 1)],
    "rows differ": [PairSpan(0, 20, 2.0), PairSpan(0, 20, 0.5, 1), PairSpan(20, 33, 1.0, 1), PairSpan(40, 50, 3.0)],
}


def passes(places: list[PairSpan], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The y's, ∂x, and ∂A and ∂B of each pair."""
    draw = torch.Generator().manual_seed(3)
    x, *states = (torch.randn(TOKENS, width, generator=draw).to(dtype) for width in (WIDTH, *OUTPUTS, *OUTPUTS))
    factors = [
        (torch.randn(shape, generator=draw) / 8).to(dtype).float()
        for number, place in enumerate(places)
        for shape in ((3 + number, WIDTH), (OUTPUTS[place.layer], 3 + number))
    ]
    x, *ys = (each.clone().to(device) for each in (x, *states[:2]))
    grads, factors = [each.to(device) for each in states[2:]], [each.to(device) for each in factors]
    pairs, grad_x = PairProducts(places, dtype, in_c=False), torch.zeros_like(x)
    shrunk = pairs.add(ys, x, factors)
    through, of_b = pairs.backward(grad_x, grads, shrunk, factors)
    assert (pairs.on_gpu is not None) == (device == "cuda")
    return [*ys, grad_x, *pairs.of_a(through, x, factors), *of_b]


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_products_are_those_of_the_cpu(name: str, dtype: torch.dtype, card: Card) -> None:
    expected, found = (passes(PLACES[name], dtype, device) for device in ("cpu", "cuda"))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        close = 2e-6 if dtype == torch.float32 else 2e-2
        assert (mine.cpu().float() - theirs.float()).abs().max() <= close * theirs.float().abs().max()


def test_each_product_is_one_launch(card: Card) -> None:
    passes(PLACES["one input"], torch.bfloat16, "cuda")
    products = {"mm": 3, "addmm_": 1 + 2 + 2 + 1}  # ∂B twice and ∂A; h, y twice, u twice, ∂x
    copies = {"cat": 1, "_to_copy": 3}
    assert {name: count for name, count in card.launches.items() if name != "zeros_like"} == {**products, **copies}


def test_a_wide_product_is_not_rounded_to_the_narrow_dtype(card: Card) -> None:
    left, right = (torch.randn(40, 40).bfloat16() for _ in range(2))
    found = wide_mm(left.to("cuda"), right.to("cuda"), torch.float32)
    assert torch.equal(found.cpu(), left.float() @ right.float())
    assert wide_mm(left, right, torch.float32).dtype == torch.float32

"""Training through a quantiser: rounded forwards, and backwards as if it were not there."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.core.adapter import Pair
from lorakeet.merge.straight_through import StraightThroughLinear
from lorakeet.quant.grids import grid_of
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase

OUT, IN = 16, 64


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer() -> tuple[StraightThroughLinear, PackedBase, Tensor]:
    latent = 0.05 * numbers(OUT, IN, seed=0)
    grid = grid_of(Nf4Base.of(latent))
    pair = Pair(0.1 * numbers(4, IN, seed=1), 0.1 * numbers(OUT, 4, seed=2), 12.0)
    return StraightThroughLinear(latent, pair, grid, numbers(OUT, seed=3)), grid.nearest(latent), latent


def test_it_begins_with_what_was_packed() -> None:
    module, base, latent = layer()
    torch.testing.assert_close(module.weight(), latent)
    x = numbers(5, IN, seed=4)
    torch.testing.assert_close(module(x), x @ base.dense().T + module.bias)
    assert torch.equal(module.packed().dense(), base.dense())


def test_gradients_pass_the_rounding_and_reach_the_pair_alone() -> None:
    """For y = x·Q(W)ᵀ with G = ∂L/∂y: ∂L/∂W = Gᵀ·x, so ∂L/∂A = s·Bᵀ·Gᵀ·x and ∂L/∂B = s·Gᵀ·x·Aᵀ, s = 3."""
    module, _, _ = layer()
    x, grad = numbers(5, IN, seed=4), numbers(5, OUT, seed=5)
    module(x).backward(grad)
    outer = grad.T @ x
    torch.testing.assert_close(module.A.grad, 3 * module.B.detach().T @ outer)
    torch.testing.assert_close(module.B.grad, 3 * outer @ module.A.detach().T)
    assert module.bias is not None and module.bias.grad is None


def test_the_gradient_of_the_input_is_that_of_the_rounded_weight() -> None:
    module, base, _ = layer()
    x, grad = numbers(5, IN, seed=4).requires_grad_(), numbers(5, OUT, seed=5)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ base.dense())


def test_narrow_products_choose_the_same_codes() -> None:
    """Rounding happens in fp32, whatever the products run in; inputs and outputs keep their dtype."""
    wide, base, latent = layer()
    pair = Pair(wide.A.detach(), wide.B.detach(), 12.0)
    narrow = StraightThroughLinear(latent, pair, wide.grid, wide.bias, products=torch.bfloat16)
    assert torch.equal(narrow.packed().dense(), base.dense())
    x, grad = numbers(5, IN, seed=4), numbers(5, OUT, seed=5)
    for module in (wide, narrow):
        module(x).backward(grad)
    assert narrow(x).dtype == torch.float32 and narrow.A.grad is not None and narrow.A.grad.dtype == torch.float32
    torch.testing.assert_close(narrow(x), wide(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(narrow.A.grad, wide.A.grad, rtol=0.05, atol=0.05)


def test_what_is_packed_after_a_step_is_what_it_computes() -> None:
    module, base, _ = layer()
    with torch.no_grad():
        module.B += 0.2 * numbers(OUT, 4, seed=6)
    module.round()
    x = numbers(5, IN, seed=4)
    packed = module.packed().dense()
    assert not torch.equal(packed, base.dense())
    torch.testing.assert_close(module(x), x @ packed.T + module.bias)

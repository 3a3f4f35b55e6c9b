"""Elementwise ops in C against the same formulas in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.kernels.cpu import elementwise
from tiny.native import needs_native

pytestmark = needs_native

WIDTH, TOKENS = 48, 7


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(mine: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    """Within so many of the roundings to bf16, each of half a unit in the last place."""
    allowed = roundings * 2**-8 * exact.abs() + 1e-6
    assert bool(((mine.double() - exact).abs() <= allowed).all())


def test_norm_and_its_gradient() -> None:
    x, weight, grad = numbers(TOKENS, WIDTH), numbers(WIDTH, seed=1), numbers(TOKENS, WIDTH, seed=2)
    y, rho = elementwise.norm(x, weight, 1e-5)
    exact = x.double().requires_grad_()
    theirs = weight.double() * exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    close(y, theirs.detach(), 2.1)  # rounded before and after the weight
    assert rho.shape == (TOKENS, 1)
    assert torch.equal(elementwise.norm_again(x, rho, weight), y)
    (theirs * grad.double()).sum().backward()
    assert exact.grad is not None
    found = elementwise.norm_backward(grad, x, rho, weight)
    torch.testing.assert_close(found.double(), exact.grad, rtol=2**-8, atol=1e-5)


def test_gate_and_its_gradient() -> None:
    gate, up, grad = (4 * numbers(TOKENS, WIDTH, seed=seed) for seed in range(3))
    gate[0, :4] = torch.tensor([300.0, -300.0, 1e4, -1e4])
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    theirs = torch.nn.functional.silu(g) * u
    (theirs * grad.double()).sum().backward()
    close(elementwise.gated(gate, up), theirs.detach(), 1.1)
    elementwise.gated_backward_(gate, up, grad)
    assert g.grad is not None and u.grad is not None
    for mine, exact in zip((gate, up, grad), (g.grad, u.grad, theirs.detach()), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2**-8, atol=1e-4)


def test_rotation_there_and_back() -> None:
    x, angle = numbers(TOKENS, 3, 64), torch.randn(TOKENS, 32).repeat(1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    rotated = x.clone()
    elementwise.rotate_(rotated, cos, sin, False)
    half = torch.cat([-x[..., 32:], x[..., :32]], dim=-1)
    exact = x.double() * cos.double()[:, None] + half.double() * sin.double()[:, None]
    torch.testing.assert_close(rotated.double(), exact, rtol=2**-8, atol=1e-5)
    elementwise.rotate_(rotated, cos, sin, True)
    torch.testing.assert_close(rotated.float(), x.float(), rtol=2e-2, atol=3e-2)  # a rotation to bf16's rounding of its angles


def test_tensors_that_c_would_misread_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes contiguous tensors of torch\.bfloat16"):
        elementwise.norm(numbers(4, 32).float(), numbers(32), 1e-5)
    with pytest.raises(ValueError, match="takes contiguous tensors"):
        elementwise.gated(numbers(4, 64)[:, :32], numbers(4, 32))


def test_every_operator_passes_torch_s_own_checks() -> None:
    x, weight = numbers(2, 5, WIDTH), numbers(WIDTH)
    rho = torch.ones(2, 5, 1)
    checked: list[tuple[Any, tuple[Any, ...]]] = [
        (elementwise.norm, (x, weight, 1e-5)),
        (elementwise.norm_again, (x, rho, weight)),
        (elementwise.norm_backward, (x, x, rho, weight)),
        (elementwise.gated, (x, x.clone())),
        (elementwise.gated_backward_, (x.clone(), x.clone(), x.clone())),
        (elementwise.rotate_, (numbers(5, 2, 64), numbers(5, 64), numbers(5, 64), False)),
    ]
    for operator, given in checked:
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))

"""The Triton kernels of norms, gates and rotations, in Triton's interpreter, against the same formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.core.fused.attention import rotated
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton

pytestmark = needs_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype).to(DEVICE)


def near(found: Tensor, expected: Tensor, roundings: int = 2) -> None:
    """Equal to so many roundings of the dtype, relative to the largest number."""
    allowed = roundings * torch.finfo(found.dtype).eps * float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) <= max(allowed, 1e-6), (found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 48), (1, 4, 576), (5, 1025)])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from lorakeet.kernels.triton import elementwise

    x, grad = (numbers(*shape, dtype=dtype, seed=seed, spread=3.0) for seed in (1, 2))
    weight = numbers(shape[-1], dtype=dtype, seed=3)
    y, rho = elementwise.norm(x, weight, EPSILON)
    leaf = x.double().requires_grad_()
    scale = torch.rsqrt(leaf.square().mean(-1, keepdim=True) + EPSILON)
    expected = weight.double() * (leaf * scale)
    (of_x,) = torch.autograd.grad(expected, leaf, grad.double())
    assert y.dtype == dtype and rho.shape == (*shape[:-1], 1) and rho.dtype == torch.float32
    near(y, expected.detach())
    near(rho, scale.detach(), roundings=4)
    assert torch.equal(elementwise.norm_again(x, rho, weight), y)
    near(elementwise.norm_backward(grad, x, rho, weight), of_x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 1024, 2500])  # also a last program that is not full
def test_gate(dtype: torch.dtype, count: int) -> None:
    from lorakeet.kernels.triton import elementwise

    gate, up, grad = (numbers(count, 1, dtype=dtype, seed=seed, spread=4.0) for seed in (4, 5, 6))
    gate[0] = -60.0  # exp(60) is no half precision number
    leaves = [each.double().requires_grad_() for each in (gate, up)]
    expected = torch.nn.functional.silu(leaves[0]) * leaves[1]
    of_gate, of_up = torch.autograd.grad(expected, leaves, grad.double())
    inner = elementwise.gated(gate, up)
    near(inner, expected.detach())
    elementwise.gated_backward_(gate, up, grad)
    near(gate, of_gate, roundings=4)
    near(up, of_up, roundings=4)
    assert torch.equal(grad, inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [2, 6, 64])
@pytest.mark.parametrize("back", [False, True])
def test_rotation(dtype: torch.dtype, head: int, back: bool) -> None:
    from lorakeet.kernels.triton import elementwise

    states = numbers(4, 3, head, dtype=dtype, seed=7)
    cos, sin = (numbers(4, head, dtype=dtype, seed=seed) for seed in (8, 9))
    expected = rotated(states.double(), cos.double(), sin.double(), back=back)
    elementwise.rotate_(states, cos, sin, back)
    near(states, expected)


def test_nothing_is_made_of_nothing() -> None:
    from lorakeet.kernels.triton import elementwise

    nothing = numbers(0, 8, dtype=torch.float32)
    y, rho = elementwise.norm(nothing, numbers(8, dtype=torch.float32), EPSILON)
    assert y.shape == (0, 8) and rho.shape == (0, 1) and elementwise.gated(nothing, nothing).shape == (0, 8)
    elementwise.rotate_(nothing[:, None], nothing, nothing, back=False)

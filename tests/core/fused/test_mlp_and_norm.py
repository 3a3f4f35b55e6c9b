"""Fused pieces against the plain composition of the same modules, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.fused.mlp_and_norm import ACTIVATIONS, FrozenRmsNorm, GatedMlp
from lorakeet.core.layers.linear import LoraLinear, dense_base_of, new_pair
from lorakeet.core.plan import PlanEntry

RANK, ALPHA = 4, 12.0


class Mlp(nn.Module):
    def __init__(self, activation: str, hidden: int = 10, inner: int = 14) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act.forward(self.gate_proj(x)) * self.up_proj(x))


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5, requires_grad=False)
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


def adapted(activation: str, dtype: torch.dtype, dropout: float = 0.0) -> Mlp:
    torch.manual_seed(0)
    mlp = Mlp(activation).to(dtype).requires_grad_(False)
    for name, child in list(mlp.named_children()):
        entry = PlanEntry(name, "linear", tuple(child.weight.shape), RANK, ALPHA, dropout=dropout)
        layer = LoraLinear(child, dense_base_of(child, "linear"))
        pair = new_pair(entry, weight=lambda child=child: child.weight, seed=0)
        nn.init.normal_(pair.B, std=0.3)
        layer.attach("a", pair.to(torch.float64 if dtype == torch.float64 else torch.float32))
        layer.active = "a"
        setattr(mlp, name, layer)
    return mlp


def results(module: nn.Module, mlp: Mlp, x: Tensor) -> list[Tensor]:
    for parameter in mlp.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.ones_like(y) * torch.arange(y.shape[-1], dtype=y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)]


def test_fused_mlp_gives_the_outputs_and_gradients_of_its_parts() -> None:
    for activation in ACTIVATIONS:
        mlp = adapted(activation, torch.float64)
        x = torch.randn(2, 3, 10, dtype=torch.float64)
        plain, fused = results(mlp, mlp, x), results(GatedMlp(mlp, activation), mlp, x)
        assert len(plain) == 8
        for expected, found in zip(plain, fused, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_fused_mlp_in_bf16_is_as_close_to_fp64_as_its_parts_are() -> None:
    exact = adapted("silu", torch.float64)
    narrow = adapted("silu", torch.bfloat16)
    x = torch.randn(4, 10, dtype=torch.float64)
    truth = results(exact, exact, x)
    plain, fused = (results(module, narrow, x.bfloat16()) for module in (narrow, GatedMlp(narrow, "silu")))
    for right, other, found in zip(truth, plain, fused, strict=True):
        scale = right.abs().max()
        assert (found.double() - right).abs().max() <= 1.5 * (other.double() - right).abs().max() + 0.01 * scale


def test_products_in_fp32_over_bf16_weights_are_closer_to_the_truth() -> None:
    exact, narrow = adapted("silu", torch.float64), adapted("silu", torch.bfloat16)
    for name, child in narrow.named_children():
        getattr(exact, name).original.weight.copy_(child.original.weight.double())
    x = torch.randn(64, 10, dtype=torch.float64).bfloat16()
    truth = exact(x.double())
    narrow_error = (GatedMlp(narrow, "silu")(x).double() - truth).abs().mean()
    for child in narrow.children():
        child.products = torch.float32
    wide_error = (GatedMlp(narrow, "silu")(x).double() - truth).abs().mean()
    assert wide_error < narrow_error


def test_without_a_plain_pair_the_original_runs() -> None:
    mlp = adapted("silu", torch.float64)
    x = torch.randn(2, 10, dtype=torch.float64)
    stand_in = GatedMlp(mlp, "silu")
    mlp.up_proj.active = None
    assert torch.equal(stand_in(x), mlp(x))
    dropped = adapted("silu", torch.float64, dropout=0.5)
    torch.manual_seed(3)
    expected = dropped(x)
    torch.manual_seed(3)
    assert torch.equal(GatedMlp(dropped, "silu")(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_mlp_that_only_hands_gradients_on_keeps_two_results_of_four(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = Mlp("silu").to(dtype).requires_grad_(False)
    stand_in, x = GatedMlp(mlp, "silu"), torch.randn(6, 10, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for expected, found in zip(results(mlp, mlp, x), results(stand_in, mlp, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(stand_in(x.requires_grad_()), mlp(x)), "the same forward pass, bit for bit"
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = stand_in(x)
    assert sum(kept.values()) == 2 * 6 * 14 * dtype.itemsize and y.requires_grad
    with torch.no_grad():
        assert not stand_in(x).requires_grad
    mlp.up_proj.weight.requires_grad_()
    stand_in(x).sum().backward()
    assert mlp.up_proj.weight.grad is not None, "one that is trained whole goes its own way"


def test_gate_and_up_may_have_different_ranks_and_scales() -> None:
    mlp = adapted("silu", torch.float64)
    entry = PlanEntry("up_proj", "linear", (14, 10), 2, 10.0)
    pair = new_pair(entry, weight=lambda: mlp.up_proj.weight, seed=1).double()
    nn.init.normal_(pair.B)
    mlp.up_proj.attach("a", pair)
    x = torch.randn(5, 10, dtype=torch.float64)
    for expected, found in zip(results(mlp, mlp, x), results(GatedMlp(mlp, "silu"), mlp, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_frozen_rms_norm_is_the_original_forward_and_backward() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        norm = Norm(12).to(dtype)
        x = torch.randn(7, 12, dtype=dtype)
        gradients = []
        for module in (norm, FrozenRmsNorm(norm)):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            (y * torch.arange(12, dtype=dtype)).sum().backward()
            gradients.append(leaf.grad)
            assert torch.equal(y.detach(), norm(x))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)

"""Who makes a pass: C, Triton where it is asked for, or torch; and modules that ask compute what torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.fused import elementwise
from lorakeet.core.fused.elementwise import IN_C, WIDEST, passes_over
from lorakeet.core.fused.mlp_and_norm import FrozenRmsNorm, GatedMlp
from lorakeet.core.layers.linear import LoraLinear, dense_base_of, new_pair
from lorakeet.core.plan import PlanEntry
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.tiled_weight import TritonRequest
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton


def states(width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)


def test_nobody_is_asked_and_torch_makes_it() -> None:
    assert passes_over(states()) is None and passes_over(states(dtype=torch.float64), kernels=TritonRequest()) is None


def test_c_makes_it_where_it_serves_whatever_is_asked() -> None:
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    expected = IN_C if operators.serves(torch.bfloat16, x) else None
    assert passes_over(x) is expected


@needs_triton
def test_triton_makes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)
    x = states()
    found = passes_over(x, kernels=TritonRequest())
    assert found is not None and found is not IN_C
    for refused in ((x.t(),), (x, x.half()), (x.double(),)):
        assert passes_over(*refused, kernels=TritonRequest()) is None
    wide = torch.zeros(1, WIDEST + 1, device=DEVICE)
    assert passes_over(wide, kernels=TritonRequest(), by_rows=True) is None
    assert passes_over(wide, kernels=TritonRequest()) is not None


class Norm(nn.Module):
    variance_epsilon = 1e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width), requires_grad=False)


class Mlp(nn.Module):
    """A gated MLP as transformers has it, with a pair on each layer."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("gate_proj", (12, 40)), ("up_proj", (12, 40)), ("down_proj", (40, 12))):
            layer = nn.Linear(*shape, bias=False).requires_grad_(False)
            standing = LoraLinear(layer, dense_base_of(layer, "linear"))
            pair = new_pair(PlanEntry(name, "linear", (shape[1], shape[0]), 4, 8.0), weight=lambda own=layer: own.weight, seed=0)
            nn.init.normal_(pair.B, std=0.3)
            standing.attach("a", pair)
            standing.active = "a"
            setattr(self, name, standing)


def trained(norm: FrozenRmsNorm, mlp: GatedMlp, kernels: TritonRequest | None) -> list[Tensor]:
    """What a norm and the MLP behind it make, and all gradients."""
    norm.kernels = kernels
    for layer in mlp.original.children():
        layer.base.kernels = kernels  # type: ignore[union-attr]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    factors = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    out = mlp(norm(x))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *factors])]


@needs_triton
def test_a_norm_and_a_gated_mlp_that_ask_for_it_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)
    torch.manual_seed(0)
    norm, mlp = FrozenRmsNorm(Norm(12)).to(DEVICE), GatedMlp(Mlp(), "silu").to(DEVICE)
    expected = trained(norm, mlp, None)
    called: list[str] = []
    of_triton = elementwise._of_triton

    def noting() -> Any:
        return type(IN_C)(*(_noted(called, name, each) for name, each in of_triton()._asdict().items()))

    monkeypatch.setattr(elementwise, "_of_triton", noting)
    found = trained(norm, mlp, TritonRequest(0))
    assert called == ["norm", "gated", "gated_backward_", "norm_again", "norm_backward"]
    assert len(found) == len(expected) == 8
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _noted(called: list[str], name: str, function: Any) -> Any:
    def noted(*given: Any) -> Any:
        called.append(name)
        return function(*given)

    return noted

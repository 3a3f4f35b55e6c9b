"""The table of kernels: which one computes, why not another, and that a new line is used; modules compute what torch does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.fused.mlp_and_norm import FrozenRmsNorm, GatedMlp
from lorakeet.core.layers.linear import LoraLinear, dense_base_of, new_pair
from lorakeet.core.plan import PlanEntry
from lorakeet.kernels import choose
from lorakeet.kernels.choose import TABLE, candidates, elementwise_ops, passed_over
from lorakeet.kernels.cpu import elementwise, operators
from lorakeet.kernels.protocol import Kernel, Situation
from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.kernels.triton.support import WIDEST
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton

CPU = torch.device("cpu")


def states(width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("task", TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
def test_every_task_has_a_kernel_that_runs_and_takes_everything(task: str, dtype: torch.dtype, device: str) -> None:
    last = TABLE[task][-1]
    assert not last.why_not(Situation(torch.device(device), dtype, dtype)) and last.takes is None and not last.source


def test_each_kernel_that_is_passed_over_has_a_reason() -> None:
    situation = Situation(CPU, torch.float32, torch.float32)
    for task, kernels in TABLE.items():
        used, skipped = passed_over(task, situation)
        assert [kernel for kernel, _ in skipped] == list(kernels[: kernels.index(used)])
        assert all(len(reason.split()) > 2 for _, reason in skipped)
    reasons = {kernel.name: reason for kernel, reason in passed_over("elementwise ops", situation)[1]}
    assert reasons["C: elementwise.c"] == "takes bfloat16; states are float32, matrix products run in float32"
    assert reasons["Triton: elementwise"] == "not requested (model.kernels is torch)"


def test_kernels_have_distinct_names_within_a_task() -> None:
    for kernels in TABLE.values():
        assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_a_choice_is_made_once_for_a_situation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Situation] = []
    line = Kernel("counted", lambda it: asked.append(it) or "never")  # type: ignore[func-returns-value]
    monkeypatch.setitem(TABLE, "elementwise ops", (line, *TABLE["elementwise ops"]))
    monkeypatch.setattr(choose, "CANDIDATES", {})
    for _ in range(3):
        candidates("elementwise ops", CPU, torch.float32)
    with operators.torch_only():
        candidates("elementwise ops", CPU, torch.float32)
    assert [situation.c for situation in asked] == [True, False]


def test_without_a_request_torch_computes() -> None:
    assert elementwise_ops(states()) is None and elementwise_ops(states(dtype=torch.float64), triton=TritonRequest()) is None


def test_c_computes_what_it_can_whatever_is_requested() -> None:
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    assert elementwise_ops(x, triton=TritonRequest()) is (elementwise if operators.supports(x) else None)


@needs_triton
def test_triton_computes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)
    x = states()
    found = elementwise_ops(x, triton=TritonRequest())
    assert found is not None and found is not elementwise
    for refused in ((x.t(),), (x, x.half()), (x.double(),)):
        assert elementwise_ops(*refused, triton=TritonRequest()) is None
    wide = torch.zeros(1, WIDEST + 1, device=DEVICE)
    assert elementwise_ops(wide, triton=TritonRequest(), by_rows=True) is None
    assert elementwise_ops(wide, triton=TritonRequest()) is not None


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
def test_a_norm_and_a_gated_mlp_compute_the_same_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)
    torch.manual_seed(0)
    norm, mlp = FrozenRmsNorm(Norm(12)).to(DEVICE), GatedMlp(Mlp(), "silu").to(DEVICE)
    expected = trained(norm, mlp, None)
    called: list[str] = []
    ops = elementwise_ops(states(), triton=TritonRequest())
    names = "norm", "norm_again", "norm_backward", "gated", "gated_backward_", "rotate_"
    noting = SimpleNamespace(**{name: _noted(called, name, getattr(ops, name)) for name in names})
    monkeypatch.setattr("lorakeet.core.fused.mlp_and_norm.elementwise_ops", lambda *_, triton, **__: noting if triton else None)
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

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
from lorakeet.kernels.choose import TABLE, elementwise_ops, passed_over
from lorakeet.kernels.cpu import elementwise, operators
from lorakeet.kernels.protocol import Situation

CPU = torch.device("cpu")


def states(width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)


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
    assert reasons["Liger: norm, gate, rotary positions"] == "it is a kernel for CUDA GPUs"


def test_kernels_have_distinct_names_within_a_task() -> None:
    for kernels in TABLE.values():
        assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_without_a_kernel_for_it_torch_computes() -> None:
    assert elementwise_ops(states()) is None and elementwise_ops(states(dtype=torch.float64)) is None


def test_c_computes_what_it_can() -> None:
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    assert elementwise_ops(x) is (elementwise if operators.supports(x) else None)


def test_liger_computes_what_it_can(liger: Any) -> None:
    x = states()
    assert elementwise_ops(x, x) is liger and elementwise_ops(x, by_rows=True) is liger
    for refused in ((x.t(), x.t()), (x, x.half()), (x.double(), x.double())):
        assert elementwise_ops(*refused) is None
    wide = torch.zeros(1, liger.WIDEST + 1)
    assert elementwise_ops(wide, wide) is None


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


def trained(norm: FrozenRmsNorm, mlp: GatedMlp) -> list[Tensor]:
    """What a norm and the MLP behind it make, and all gradients."""
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    factors = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    out = mlp(norm(x))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *factors])]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_norm_and_a_gated_mlp_compute_the_same_by_liger(
    activation: str, liger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = ["gated", "gated_backward_"] if activation == "silu" else ["gelu_gated", "gelu_gated_backward_"]
    torch.manual_seed(0)
    norm, mlp = FrozenRmsNorm(Norm(12)), GatedMlp(Mlp(), activation)
    with monkeypatch.context() as patch:
        patch.setattr("lorakeet.core.fused.mlp_and_norm.elementwise_ops", lambda *_, **__: None)
        expected = trained(norm, mlp)
    called: list[str] = []
    names = ("norm", "norm_again", "norm_backward", "gated", "gated_backward_", "gelu_gated", "gelu_gated_backward_")
    noting = SimpleNamespace(**{name: _noted(called, name, getattr(liger, name)) for name in names})
    monkeypatch.setattr("lorakeet.core.fused.mlp_and_norm.elementwise_ops", lambda *_, **__: noting)
    found = trained(norm, mlp)
    assert called == ["norm", *calls, "norm_again", "norm_backward"]
    assert len(found) == len(expected) == 8
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _noted(called: list[str], name: str, function: Any) -> Any:
    def noted(*given: Any) -> Any:
        called.append(name)
        return function(*given)

    return noted

"""The one autograd function: its gradients against numbers and against torch's own, and the pair around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.base import DenseBase, FrozenBase, SliceBase, TransposedBase
from lorakeet.core.lowrank import LoraPair, LowRankLinear, frozen_linear, low_rank_linear
from lorakeet.core.plan import PlanEntry
from tiny.adapters import random_pair

SCALE = 3.0  # alpha 12, rank 4
DOUBLE = torch.float64


def base_named(name: str, dtype: torch.dtype = DOUBLE) -> FrozenBase:
    torch.manual_seed(0)
    if name == "linear":
        return DenseBase(nn.Linear(5, 7, dtype=dtype).requires_grad_(False))
    if name == "conv1d":
        module = Conv1D(7, 5).to(dtype).requires_grad_(False)
        return TransposedBase(module)
    return SliceBase(torch.randn(3, 7, 5, dtype=dtype), 2)


def leaf(*shape: int, dtype: torch.dtype = DOUBLE, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv1d", "slice"])
def test_gradients_against_finite_differences(name: str, dropout: bool, bias: bool, x_grad: bool) -> None:
    base, b = base_named(name), torch.randn(7, dtype=DOUBLE) if bias else None
    mask = (torch.rand(6, 5) > 0.3).to(DOUBLE) / 0.7

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return LowRankLinear.apply(x, x * mask if dropout else None, A, B, SCALE, base, b, DOUBLE)

    x, A, B = leaf(6, 5, grad=x_grad), leaf(4, 5), leaf(7, 4)
    assert torch.autograd.gradcheck(run, (x, A, B))
    dropped = x * mask if dropout else x
    expected = x @ base.dense().T + SCALE * dropped @ A.T @ B.T + (b if b is not None else 0)
    assert torch.allclose(run(x, A, B), expected, rtol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    """What is saved is no function of A, B and x any more, so it would be wrong."""
    x, A, B = leaf(6, 5), leaf(4, 5), leaf(7, 4)
    y = low_rank_linear(x, base_named("linear"), (A, B, SCALE)) + frozen_linear(x, base_named("linear"))
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_gets_no_gradient(frozen: str) -> None:
    x, A, B = leaf(6, 5), leaf(4, 5, grad=frozen != "A"), leaf(7, 4, grad=frozen != "B")
    low_rank_linear(x, base_named("linear"), (A, B, SCALE)).sum().backward()
    assert x.grad is not None
    assert (A.grad is None, B.grad is None) == (frozen == "A", frozen == "B")


def test_leading_dimensions_and_strides() -> None:
    base, A, B = base_named("linear"), leaf(4, 5), leaf(7, 4)
    x = torch.randn(3, 5, 2, dtype=DOUBLE).transpose(1, 2).requires_grad_()  # (3, 2, 5), not contiguous
    y = low_rank_linear(x, base, (A, B, SCALE))
    assert torch.allclose(y, x @ base.dense().T + SCALE * x @ A.T @ B.T)
    y.transpose(0, 2).sum(0).sum().backward()
    assert torch.allclose(x.grad, (base.dense() + SCALE * B @ A).sum(0).expand_as(x))


def test_dropout_drops_for_the_pair_alone() -> None:
    base, A, B = base_named("linear"), leaf(4, 5), leaf(7, 4)
    x = leaf(4000, 5)
    torch.manual_seed(1)
    y = low_rank_linear(x, base, (A, B, SCALE), dropout=0.5)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    assert torch.allclose(y, x @ base.dense().T + SCALE * dropped @ A.T @ B.T)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("products", [None, torch.float32])
def test_fp32_factors_under_bf16_activations(products: torch.dtype | None) -> None:
    base = base_named("linear", torch.bfloat16)
    x, A, B = leaf(6, 5, dtype=torch.bfloat16), leaf(4, 5, dtype=torch.float32), leaf(7, 4, dtype=torch.float32)
    y = low_rank_linear(x, base, (A, B, SCALE), products=products)
    y.float().pow(2).sum().backward()
    assert (y.dtype, x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    exact = x.double() @ base.dense().double().T + SCALE * x.double() @ A.double().T @ B.double().T
    assert (y.double() - exact).abs().max() <= 2.0 ** (-8 if products else -6) * exact.abs().max()


def test_the_backward_keeps_no_weight() -> None:
    base = base_named("linear")
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low_rank_linear(leaf(6, 5), base, (leaf(4, 5), leaf(7, 4), SCALE))
    assert sorted(kept) == [(4, 5), (6, 4), (6, 5), (7, 4)]  # A, x·Aᵀ, x, B


def test_frozen_linear_alone() -> None:
    base, bias = base_named("conv1d"), torch.randn(7, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, base, bias=bias), (leaf(6, 5),))


ENTRY = PlanEntry("q", "linear", (7, 5), 4, 12.0, dropout=0.5)


def filled(entry: PlanEntry = ENTRY, bias: bool = False) -> LoraPair:
    pair = LoraPair(entry, bias=bias)
    for parameter in pair.parameters():
        nn.init.normal_(parameter)
    return pair


def test_dropout_is_for_training_only() -> None:
    pair, base, x = filled().eval(), base_named("linear", torch.float32), torch.randn(6, 5)
    assert torch.equal(pair(x, base), pair(x, base))
    pair.train()
    assert not torch.equal(pair(x, base), pair(x, base))


def test_a_pairs_bias_is_scaled() -> None:
    pair, base, x = filled(bias=True).eval(), base_named("linear", torch.float32), torch.randn(6, 5)
    expected = x @ (base.dense() + pair.delta()).T + 3 * pair.bias
    assert torch.allclose(pair(x, base), expected, atol=1e-5)


def test_an_anchor_is_subtracted_and_comes_out_as_twice_the_rank() -> None:
    pair, base, x = filled().eval(), base_named("linear", torch.float32), torch.randn(6, 5)
    pair.anchor_A, pair.anchor_B = torch.randn(4, 5), torch.randn(7, 4)
    change = 3 * (pair.B @ pair.A - pair.anchor_B @ pair.anchor_A)
    assert torch.allclose(pair.delta(), change, atol=1e-5)
    assert torch.allclose(pair(x, base), x @ (base.dense() + change).T, atol=1e-4)
    value = pair.value()
    assert (value.rank, value.alpha, value.scale) == (8, 24, 3)
    assert torch.allclose(value.delta(), change, atol=1e-5)


@pytest.mark.parametrize("rule", ["alpha/rank", "alpha/sqrt(rank)"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv2d", "experts"])
def test_value_and_load_are_inverse(kind: str, rule: str) -> None:
    weight = torch.zeros({"conv2d": (7, 5, 3, 3), "experts": (3, 7, 5)}.get(kind, (7, 5)))
    value = random_pair(kind, weight, scale_rule=rule)
    shape = (5, 7) if kind == "conv1d" else tuple(weight.shape)
    pair = LoraPair(PlanEntry("q", kind, shape, 4, 12.0, rule))  # type: ignore[arg-type]
    pair.load(value)
    back = pair.value()
    assert torch.equal(back.A, value.A) and torch.equal(back.B, value.B)
    assert (back.kind, back.scale_rule, back.alpha, back.scale) == (kind, rule, 12, value.scale)
    assert torch.equal(pair.delta(), value.delta())
    folded = pair.fold(nn.Parameter(weight))
    assert torch.equal(folded, value.delta()) and folded.is_contiguous() and not folded.requires_grad
    narrow = pair.fold(weight.bfloat16())
    assert torch.equal(narrow, value.delta().bfloat16()) and narrow.is_contiguous()


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "experts"])
@pytest.mark.parametrize("rule", ["alpha/rank", "alpha/sqrt(rank)"])
def test_what_is_kept_of_a_pair_computes_what_it_did(kind: str, rule: str) -> None:
    """Terms whose b or a is zero go without a trace; the scale is that of the first rank."""
    shape = (3, 7, 5) if kind == "experts" else (7, 5)
    pair = LoraPair(PlanEntry("x", kind, shape, 4, 12.0, rule))  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.no_grad():
        pair.A.normal_()
        pair.B.normal_()
        pair.B.select(-1, 1).zero_()
        pair.A.select(-2, 3).zero_()
    before, live, scale = pair.delta(), (pair.A, pair.B), pair.scale
    pair.keep(torch.tensor([0, 2]))
    assert pair.rank == 2 and live == (pair.A, pair.B) and pair.scale == scale
    torch.testing.assert_close(pair.delta(), before, rtol=1e-6, atol=1e-6)
    value = pair.value()
    assert value.rank == 2 and value.scale == pytest.approx(scale, rel=1e-12)
    torch.testing.assert_close(value.delta(), before, rtol=1e-6, atol=1e-6)


def test_a_pair_without_terms_is_the_base_and_its_gradients_are_empty() -> None:
    base = base_named("linear", torch.float32)
    pair = LoraPair(PlanEntry("x", "linear", (7, 5), 4, 12.0))
    pair.keep(torch.tensor([], dtype=torch.int64))
    x = torch.randn(6, 5, requires_grad=True)
    y = pair(x, base)
    assert torch.equal(y, base.matmul(x.detach()))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, base.matmul_t(torch.ones(6, 7)))
    assert pair.A.grad is not None and pair.A.grad.shape == (0, 5) and pair.B.grad is not None and pair.B.grad.shape == (7, 0)
    assert not pair.delta().any()


def test_a_pair_that_is_more_than_its_terms_is_not_cut() -> None:
    pair = LoraPair(PlanEntry("x", "linear", (7, 5), 4, 12.0))
    pair.anchor_A, pair.anchor_B = torch.zeros(4, 5), torch.zeros(7, 4)
    biased = LoraPair(PlanEntry("x", "linear", (7, 5), 4, 12.0), bias=True)
    for refused in (pair, biased):
        with pytest.raises(ValueError, match="initial values, a bias or a trained magnitude"):
            refused.keep(torch.tensor([0]))
        assert refused.rank == 4

"""How pairs begin: the model's function is unchanged, and A and B are what the papers define."""

from __future__ import annotations

import math
import warnings

import peft
import pytest
import torch
from torch import nn

from lorakeet.core.initialise import EXACT_SVD_UP_TO, seed_for
from lorakeet.core.layers.linear import new_pair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry

SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (24, 16), "conv1d": (24, 16), "embedding": (40, 16), "conv2d": (12, 6, 3, 3), "experts": (3, 24, 16),
}  # fmt: skip


def begun(
    kind: str, start: str, weight: torch.Tensor | None = None, *, seed: int = 0, path: str = "q", rank: int = 4
) -> LoraPair:
    weight = torch.randn(SHAPES[kind]) if weight is None else weight
    entry = PlanEntry(path, kind, tuple(weight.shape), rank, 3.0 * rank, start=start)  # type: ignore[arg-type]
    return new_pair(entry, weight=lambda: weight, seed=seed)


ALL = [(kind, start) for kind in SHAPES for start in ("kaiming", "gaussian", "orthogonal")]
LINEAR = [(kind, start) for kind in ("linear", "conv1d") for start in ("pissa", "olora")]


@pytest.mark.parametrize(("kind", "start"), ALL + LINEAR)
def test_no_start_changes_the_function(kind: str, start: str) -> None:
    pair = begun(kind, start)
    change = pair.delta()
    if start in ("kaiming", "gaussian"):
        assert not change.any()
    assert change.abs().max() <= 2e-6
    if start not in ("kaiming", "gaussian"):
        assert pair.A.abs().min(dim=-1).values.max() > 0 and pair.B.abs().max() > 0


@pytest.mark.parametrize(("kind", "fan_in"), [("linear", 16), ("conv1d", 16), ("conv2d", 54), ("experts", 16)])
def test_kaiming_bounds(kind: str, fan_in: int) -> None:
    """Uniform between ±1/√fan_in, as nn.Linear has it: the largest of many lies close to the bound."""
    A = begun(kind, "kaiming").A
    bound = 1 / math.sqrt(fan_in)
    assert 0.9 * bound < A.abs().max() <= bound
    assert A.mean().abs() < 0.3 * bound


@pytest.mark.parametrize("kind", ["linear", "conv2d", "experts"])
def test_gaussian_has_a_deviation_of_one_over_rank(kind: str) -> None:
    assert begun(kind, "gaussian", rank=6).A.std().item() == pytest.approx(1 / 6, rel=0.2)


def test_an_embedding_begins_with_a_zero_and_b_random() -> None:
    pair = begun("embedding", "kaiming")
    assert not pair.A.any() and pair.B.std().item() == pytest.approx(1, rel=0.2)


def test_pissa_is_the_top_of_the_svd() -> None:
    weight = torch.randn(24, 16)
    pair = begun("linear", "pissa", weight)
    U, S, Vh = torch.linalg.svd(weight)
    best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
    assert torch.allclose(3 * pair.B @ pair.A, best, atol=1e-5)
    assert torch.allclose(3 * pair.B.T @ pair.B, torch.diag(S[:4]), atol=1e-4)  # B = U·√S, so BᵀB = S
    assert torch.equal(pair.anchor_A, pair.A) and torch.equal(pair.anchor_B, pair.B)


def test_pissa_of_a_large_matrix_is_close_to_the_svd() -> None:
    size = EXACT_SVD_UP_TO + 64
    left, right = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    weight = left @ torch.diag(0.97 ** torch.arange(size)) @ right.T
    best = left[:, :8] @ torch.diag(0.97 ** torch.arange(8.0)) @ right[:, :8].T
    pair = begun("linear", "pissa", weight, rank=8)
    assert (3 * pair.B @ pair.A - best).norm() < 1e-2 * best.norm()


def test_olora_is_the_top_of_the_qr() -> None:
    weight = torch.randn(24, 16)
    pair = begun("linear", "olora", weight)
    Q, R = torch.linalg.qr(weight)
    assert torch.allclose(pair.B @ pair.A, Q[:, :4] @ R[:4], atol=1e-5)
    assert torch.allclose(pair.B.T @ pair.B, torch.eye(4), atol=1e-5)


def test_orthogonal_has_orthogonal_rank_sides() -> None:
    pair = begun("linear", "orthogonal")
    assert (pair.B @ pair.A).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(pair.A) == torch.linalg.matrix_rank(pair.B) == 2


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_anchored_training_equals_pefts_residual_base(start: str) -> None:
    """PEFT takes the start out of the base weight; we keep the base and subtract the start: the same function.

    PEFT's change is (W − s·B₀·A₀) + s·B·A, ours W + s·(B·A − B₀·A₀), whatever the factors, since both begin alike.
    """
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 24, bias=False)), torch.randn(5, 16)
    weight = net[0].weight.detach().clone()
    pair = begun("linear", start, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=start)
        theirs = peft.get_peft_model(net, config).base_model.model[0]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert torch.allclose(B @ A, pair.B @ pair.A, atol=1e-5)
    assert torch.allclose(theirs(x), x @ weight.T, atol=1e-4)
    step_b, step_a = torch.randn(24, 4) * 0.1, torch.randn(4, 16) * 0.1
    with torch.no_grad():
        flip = torch.sign((B * pair.B).sum(0))  # singular vectors are unique up to their sign
        pair.B.add_(step_b)
        pair.A.add_(step_a)
        B.add_(step_b * flip)
        A.add_(step_a * flip[:, None])
    assert torch.allclose(theirs(x), x @ (weight + pair.delta()).T, atol=1e-4)


def test_numbers_depend_on_seed_and_path_alone() -> None:
    first, again = begun("linear", "kaiming", seed=7), begun("linear", "kaiming", seed=7)
    torch.manual_seed(123)
    assert torch.equal(first.A, again.A)
    assert not torch.equal(first.A, begun("linear", "kaiming", seed=8).A)
    assert not torch.equal(first.A, begun("linear", "kaiming", seed=7, path="k").A)
    assert seed_for(7, "q") == seed_for(7, "q") != seed_for(7, "k")
    assert 0 <= seed_for(0, "") < 2**63


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for start in ("kaiming", "gaussian", "orthogonal", "pissa"):
        begun("linear", start, torch.eye(24, 16))
    assert torch.equal(torch.get_rng_state(), before)

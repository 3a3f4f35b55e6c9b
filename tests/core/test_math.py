"""The formula and its shapes, each against its own literal sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.core.math import add_low_rank, alpha_for, delta, fold, scale_of


def test_scale_rules() -> None:
    assert scale_of(12, 4) == 3
    assert scale_of(12, 4, "alpha/sqrt(rank)") == 6
    assert scale_of(12.5, 8) == 1.5625


@given(st.floats(0.01, 1000), st.integers(1, 512), st.sampled_from(["alpha/rank", "alpha/sqrt(rank)"]))
def test_alpha_for_is_the_inverse_of_scale_of(alpha: float, rank: int, rule: str) -> None:
    assert alpha_for(scale_of(alpha, rank, rule), rank, rule) == pytest.approx(alpha, rel=1e-14)  # type: ignore[arg-type]


SHAPES = {
    "linear": ((4, 5), (7, 4), "or,ri->oi"),
    "conv1d": ((4, 5), (7, 4), "or,ri->io"),
    "embedding": ((4, 9), (6, 4), "hr,rv->vh"),
    "conv2d": ((4, 5, 3, 2), (7, 4, 1, 1), "orxy,rihw->oihw"),
    "experts": ((3, 4, 5), (3, 7, 4), "eor,eri->eoi"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_delta_is_scale_times_b_times_a(kind: str) -> None:
    shape_a, shape_b, sum_over = SHAPES[kind]
    A, B = torch.randn(shape_a, dtype=torch.float64), torch.randn(shape_b, dtype=torch.float64)
    change = delta(A, B, 3.0, kind)  # type: ignore[arg-type]
    assert torch.allclose(change, 3 * torch.einsum(sum_over, B, A), rtol=1e-13)


def test_fold_rounds_once() -> None:
    """1 + 2⁻⁹ twice added to 1: each alone is lost in bf16, together they are not."""
    weight, change = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-8 + 2.0**-9)
    assert fold(weight, change).item() == 1 + 2.0**-7
    assert fold(weight, change).dtype is torch.bfloat16
    assert fold(torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-9)).item() == 1


def test_add_low_rank_adds_in_place() -> None:
    y, shrunk, B = torch.randn(6, 7), torch.randn(6, 4), torch.randn(7, 4)
    expected = y + 3 * shrunk @ B.T
    assert add_low_rank(y, shrunk, B, 3.0) is y
    assert torch.allclose(y, expected, atol=1e-5)

"""`merge.factors`: sums stay exact, and approximations are the best of their rank, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core import initialise
from lorakeet.merging.low_rank import stack_factors, truncate_factors, truncate_matrix


def parts(count: int, out: int = 30, width: int = 20, rank: int = 4) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    torch.manual_seed(count)
    return [(torch.randn(rank, width), torch.randn(out, rank), 0.3 * (number + 1)) for number in range(count)]


def summed(found: list[tuple[torch.Tensor, torch.Tensor, float]]) -> torch.Tensor:
    return sum((weight * B.double() @ A.double() for A, B, weight in found), torch.zeros(1, dtype=torch.float64))


def best_error(whole: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(whole)
    return float((values[rank:].square().sum() / values.square().sum()).sqrt())


def test_a_stack_of_factors_is_their_sum() -> None:
    A, B = stack_factors(parts(3))
    assert A.shape == (12, 20) and B.shape == (30, 12)
    torch.testing.assert_close(B.double() @ A.double(), summed(parts(3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 3, 8, 12, 50])
def test_the_core_gives_what_a_whole_svd_gives(rank: int) -> None:
    whole = summed(parts(3))
    low = truncate_factors(*stack_factors(parts(3)), rank)
    error = float((low.B.double() @ low.A.double() - whole).norm() / whole.norm())
    assert low.A.shape == (min(rank, 12), 20) and low.B.shape == (30, min(rank, 12))
    assert error == pytest.approx(best_error(whole, rank), abs=1e-6)
    assert low.error == pytest.approx(error, abs=1e-6)
    torch.testing.assert_close(low.A.norm(dim=1), low.B.norm(dim=0))


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_a_matrix_is_approximated_as_well_as_can_be(rank: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    whole = torch.randn(shape)
    low = truncate_matrix(whole, rank, seed=0)
    error = float((low.B @ low.A - whole).norm() / whole.norm())
    assert error == pytest.approx(best_error(whole.double(), rank), abs=1e-5) and low.error == pytest.approx(error, abs=1e-5)


def test_the_randomised_svd_is_nearly_the_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decay = torch.diag(torch.arange(1, 181).float() ** -0.5)
    whole = torch.linalg.qr(torch.randn(240, 180))[0] @ decay @ torch.linalg.qr(torch.randn(180, 180))[0]
    best = best_error(whole.double(), 16)
    monkeypatch.setattr(initialise, "EXACT_SVD_UP_TO", 10)
    low = truncate_matrix(whole, 16, seed=3)
    again, other = truncate_matrix(whole, 16, seed=3), truncate_matrix(whole, 16, seed=4)
    assert low.A.shape == (16, 180) and best <= low.error + 1e-6 <= 1.002 * best
    assert torch.equal(low.A, again.A) and torch.equal(low.B, again.B) and not torch.equal(low.A, other.A)


def test_a_change_of_nothing_has_no_error() -> None:
    low = truncate_matrix(torch.zeros(6, 5), 2, seed=0)
    assert low.error == 0.0 and not (low.B @ low.A).any()
    assert truncate_factors(torch.zeros(2, 5), torch.zeros(6, 2), 1).error == 0.0

"""Dense changes compressed: the best pair of a rank, with its true error."""

from __future__ import annotations

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.formats.diffusion.dense import Compression, fit_pair


@pytest.mark.parametrize("shape", [(10, 7), (7, 10), (6, 4, 3, 3)])
def test_the_stated_error_is_the_true_one_and_the_least(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    change = torch.randn(shape)
    pair, error = fit_pair(change, Compression(rank=3))
    true = float((pair.delta() - change).norm() / change.norm())
    sigma = torch.linalg.svdvals(change.flatten(1))
    assert pair.rank == 3 and pair.scale == 1 and error == pytest.approx(true, rel=1e-4)
    assert error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-4)


def test_an_error_gives_the_smallest_rank_within_it() -> None:
    U, V = torch.linalg.qr(torch.randn(9, 9)).Q, torch.linalg.qr(torch.randn(9, 9)).Q
    change = U @ torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.01, *[0.0] * 5])) @ V
    ranks = {error: fit_pair(change, Compression(error=error))[0].rank for error in (0.5, 0.1, 0.01, 0.001)}
    assert ranks == {0.5: 1, 0.1: 2, 0.01: 3, 0.001: 4}
    both, error = fit_pair(change, Compression(rank=2, error=0.001))
    assert both.rank == 2 and error > 0.001
    nothing, error = fit_pair(torch.zeros(4, 4), Compression(error=0.1))
    assert nothing.rank == 1 and error == 0


def test_values_without_meaning_are_refused() -> None:
    for values, message in (({"rank": 0}, "--rank is 0"), ({"error": 1.5}, r"--error is 1\.5"), ({"error": -0.1}, "--error is")):
        with pytest.raises(ConfigError, match=message):
            Compression(**values)  # type: ignore[arg-type]
    assert not Compression().asked and Compression(error=0.0).asked

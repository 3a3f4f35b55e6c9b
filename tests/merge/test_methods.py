"""`merge.methods`: each published rule on numbers that can be worked out by hand, and their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakeet.merge.methods import METHODS, Contribution, combine_changes, drop_by_magnitude, drop_random, keep_largest


def parts(*changes: Any, weights: tuple[float, ...] = (), seed: int = 0) -> list[Contribution]:
    weights = weights or (1 / len(changes),) * len(changes)
    return [
        Contribution(lambda change=change: torch.tensor(change).float().clone(), weight, seed + number)
        for number, (change, weight) in enumerate(zip(changes, weights, strict=True))
    ]


def random_parts(count: int, weights: tuple[float, ...], seed: int = 0) -> list[Contribution]:
    torch.manual_seed(1)
    return parts(*(torch.randn(40, 60).tolist() for _ in range(count)), weights=weights, seed=seed)


def test_ties_by_hand() -> None:
    """Trim half of each, elect the sign of the sum, average those that agree (arXiv 2306.01708, figure 1)."""
    one, other = [[4.0, -3.0, 0.1, 0.2]], [[-1.0, -5.0, 6.0, 0.5]]
    found = combine_changes(METHODS["ties"], parts(one, other), density=0.5)
    assert found.tolist() == [[4.0, -4.0, 6.0, 0.0]]


def test_ties_with_weights_by_hand() -> None:
    one, other = [[2.0, -2.0]], [[4.0, 3.0]]
    found = combine_changes(METHODS["ties"], parts(one, other, weights=(0.8, 0.2)), density=1.0)
    torch.testing.assert_close(found, torch.tensor([[0.8 * 2 + 0.2 * 4, -2.0]]))
    subtracted = combine_changes(METHODS["ties"], parts(one, other, weights=(1.0, -1.0)), density=1.0)
    assert subtracted.tolist() == [[-8.0, -5.0]]  # (2, -4) elects minus, and the mean over one of two counts twice; (-2, -3)


def test_an_adapter_that_leaves_the_matrix_alone_has_no_vote() -> None:
    found = combine_changes(METHODS["ties"], parts([[3.0]], weights=(0.5,)), density=1.0, total=1.0)
    assert found.tolist() == [[3.0]]


def test_magnitude_keeps_the_largest_of_each() -> None:
    found = combine_changes(METHODS["magnitude"], parts([[4.0, 1.0], [-3.0, 2.0]], [[0.0, 8.0], [1.0, 2.0]]), density=0.5)
    assert found.tolist() == [[2.0, 4.0], [-1.5, 1.0]]


@pytest.mark.parametrize("name", METHODS)
def test_where_nothing_is_dropped_and_all_agree_every_method_is_the_weighted_sum(name: str) -> None:
    torch.manual_seed(0)
    changes = [torch.rand(5, 7).tolist(), torch.rand(5, 7).tolist()]
    found = combine_changes(METHODS[name], parts(*changes, weights=(0.7, 0.6)), density=1.0)
    torch.testing.assert_close(found, 0.7 * torch.tensor(changes[0]) + 0.6 * torch.tensor(changes[1]))


@pytest.mark.parametrize("prune", [drop_random, drop_by_magnitude])
def test_random_pruning_keeps_the_share_and_the_expectation(prune: Any) -> None:
    torch.manual_seed(0)
    change = torch.randn(30, 50)
    draws = torch.stack([prune(change, 0.3, torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert float((draws != 0).float().mean()) == pytest.approx(0.3, abs=0.003)
    standard_error = draws.std(0) / 20
    assert float(((draws.mean(0) - change) / standard_error).abs().mean()) < 1.0  # 0.8 for a normal deviate


def test_della_keeps_larger_entries_more_often() -> None:
    torch.manual_seed(0)
    change = torch.randn(200, 50)
    kept = torch.stack([drop_by_magnitude(change, 0.5, torch.Generator().manual_seed(seed)) != 0 for seed in range(50)])
    share = kept.float().mean(0).gather(1, change.abs().argsort(dim=1)).mean(0)
    wanted = torch.linspace(0.4, 0.6, 50)
    torch.testing.assert_close(share, wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("density", [0.01, 0.95, 1.0])
def test_probabilities_stay_probabilities_at_the_ends(density: float) -> None:
    found = drop_by_magnitude(torch.ones(1, 1000), density, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(found).all()) and float(found.max()) <= 1 / (density * 0.49)
    assert keep_largest(torch.tensor([[1.0, 2.0]]), density, torch.Generator())[0, 1] == 2.0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
def test_chance_is_seeded(name: str) -> None:
    first, second, other = (
        combine_changes(METHODS[name], random_parts(2, (0.5, 0.5), seed), density=0.5) for seed in (0, 0, 10)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)

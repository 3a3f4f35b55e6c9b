"""`export.folded`: the share of a change that a stored tensor holds is read through heavy rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorakeet.export.folded import compare_stored


class Base:
    """One matrix W with the change Δ, and one that nothing changes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(64, 64, generator=generator)
        self.change = 0.05 * torch.randn(64, 64, generator=generator)
        self.names = ["a", "b"]

    def changes(self, name: str) -> bool:
        return name == "a"

    def fetch(self, name: str, *, folded: bool = True) -> Tensor:
        return self.weight + self.change if folded and name == "a" else self.weight


@pytest.mark.parametrize("share", [1.0, 0.0, 1 / 3, 3.0])
def test_the_share_is_found_under_noise_larger_than_the_change(share: float) -> None:
    base = Base()
    noise = 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    found = compare_stored(base, [("a", base.weight + share * base.change + noise), ("b", base.weight)])
    assert found["a"].share == pytest.approx(share, abs=5 * found["a"].share_error) and found["a"].share_error < 0.06
    assert math.isnan(found["b"].share) and found["b"].rounding == 0


def test_missing_and_misshapen_tensors_are_infinitely_far() -> None:
    base = Base()
    found = compare_stored(base, [("a", torch.zeros(3)), ("c", torch.zeros(1))])
    assert found["a"].rounding == found["b"].rounding == math.inf and set(found) == {"a", "b"}

"""The Adapter as a plain value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from lorakeet.core.adapter import Adapter, TokenRows
from tiny.adapters import random_pair
from tiny.dense import change

WEIGHTS = {
    "linear": torch.ones(7, 5), "conv1d": torch.ones(5, 7), "embedding": torch.ones(9, 6), "conv2d": torch.ones(7, 5, 3, 2),
    "experts": torch.ones(3, 7, 5),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rank_scale_and_delta(kind: str) -> None:
    pair = random_pair(kind, WEIGHTS[kind])
    assert (pair.rank, pair.scale) == (4, 3)
    assert replace(pair, scale_rule="alpha/sqrt(rank)").scale == 6
    assert pair.delta().shape == WEIGHTS[kind].shape
    assert torch.allclose(pair.delta().double(), change(pair), atol=1e-6)
    narrow = replace(pair, A=pair.A.bfloat16(), B=pair.B.bfloat16())
    assert narrow.delta().dtype is torch.float32 and torch.allclose(narrow.delta(), pair.delta(), atol=0.02)


def test_parameters_counts_every_trained_number() -> None:
    dora = random_pair("linear", WEIGHTS["linear"], dora=True)
    biased = random_pair("linear", WEIGHTS["linear"], bias=torch.zeros(7))
    adapter = Adapter({"a": dora, "b": biased}, {"score.weight": torch.zeros(2, 32)}, {"e": TokenRows((3, 4), torch.zeros(2, 6))})
    assert adapter.parameters == 2 * (4 * 5 + 7 * 4) + 7 + 7 + 64 + 12


def test_it_cannot_be_changed() -> None:
    adapter = Adapter({})
    with pytest.raises(FrozenInstanceError):
        adapter.base = "other"  # type: ignore[misc]
    assert (adapter.extras, adapter.token_rows, adapter.base, adapter.metadata) == ({}, {}, "", {})

"""The Adapter as a plain value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from lorakeet.core.adapter import Adapter, FlatPairs, FlatPairsLayout, TokenRows
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


def outline(*, dora: bool = False) -> FlatPairsLayout:
    """Of two pairs, whose tensors lie in another order than their paths."""
    pair = random_pair("linear", WEIGHTS["linear"], dora=dora)
    meta = replace(pair, A=pair.A.to("meta"), B=pair.B.to("meta"), magnitude=pair.magnitude.to("meta") if dora else None)
    tensors = (meta.B, meta.A, *([meta.magnitude] if dora else []), meta.A, meta.B)
    return FlatPairsLayout({"a": meta, "b": meta if not dora else replace(meta, magnitude=None)},
                        {"a": (1, 0, 2 if dora else None, None), "b": (2 + dora, 3 + dora, None, None)}, tensors)  # fmt: skip


@pytest.mark.parametrize("dora", [False, True])
def test_alike_pairs_are_views_of_their_numbers(dora: bool) -> None:
    shared = outline(dora=dora)
    count = 2 * (4 * 5 + 7 * 4) + 7 * dora
    numbers = torch.randn(count)
    pairs = FlatPairs(shared, numbers)
    assert list(pairs) == ["a", "b"] and len(pairs) == 2 and pairs.outline is shared and "c" not in pairs
    first, second = pairs["a"], pairs["b"]
    assert torch.equal(first.B, numbers[:28].view(7, 4)) and torch.equal(first.A, numbers[28:48].view(4, 5))
    assert torch.equal(second.B, numbers[-28:].view(7, 4)) and torch.equal(second.A, numbers[-48:-28].view(4, 5))
    assert (first.magnitude is not None) is dora and second.magnitude is None and (first.alpha, first.scale) == (12, 3)
    assert not dora or torch.equal(first.magnitude, numbers[48:55])
    assert first.A.untyped_storage().data_ptr() == numbers.data_ptr(), "no copy"
    assert [part is None for part in next(pairs.parts())] == [False, False, not dora, True]
    assert Adapter(pairs).parameters == Adapter(dict(pairs)).parameters == count
    assert all(pair.A.is_meta for pair in FlatPairs(shared, torch.empty(count, device="meta")).values())


@pytest.mark.parametrize(("numbers", "said"), [(torch.zeros(95), "(95,)"), (torch.zeros(97), "(97,)"), (torch.zeros(2, 48), "48"),
                                               (torch.zeros(96, dtype=torch.float64), "float64")])  # fmt: skip
def test_alike_pairs_need_as_many_numbers_as_their_outline(numbers: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match="96 numbers in fp32") as error:
        FlatPairs(outline(), numbers)
    assert said in str(error.value)

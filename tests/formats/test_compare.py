"""Comparing adapters: the same change in other factors is equal, and everything else is found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.formats.compare import compare_adapters, relative_difference
from tiny.adapters import random_pair
from tiny.portable import text_adapter

WEIGHTS = {"linear": (6, 8), "conv1d": (8, 6), "conv2d": (6, 4, 3, 3), "embedding": (9, 6), "experts": (3, 6, 8)}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_difference_is_that_of_the_dense_changes(kind: str) -> None:
    torch.manual_seed(0)
    one, two = (random_pair(kind, torch.randn(WEIGHTS[kind]), rank=rank) for rank in (4, 3))
    dense = float((one.delta() - two.delta()).norm() / one.delta().norm())
    assert relative_difference(one, two) == pytest.approx(dense, rel=1e-5)
    assert relative_difference(one, one) <= 1e-12


def test_other_factors_of_the_same_change_are_equal() -> None:
    pair = random_pair("linear", torch.ones(6, 8))
    mix = torch.randn(4, 4) + 3 * torch.eye(4)
    same = Pair(mix @ pair.A, pair.B @ torch.linalg.inv(mix) * 3, 4.0)
    assert relative_difference(pair, same) <= 1e-6
    assert relative_difference(pair, dataclasses.replace(same, alpha=4.1)) == pytest.approx(0.025, rel=1e-3)


def test_nothing_against_something_is_no_small_difference() -> None:
    pair = random_pair("linear", torch.ones(6, 8))
    nothing = dataclasses.replace(pair, B=torch.zeros_like(pair.B))
    assert relative_difference(nothing, nothing) == 0 and relative_difference(nothing, pair) == float("inf")


def test_what_else_differs_is_named() -> None:
    one = text_adapter(dora=True)
    first, second, *rest = one.pairs
    changed = dict(one.pairs)
    del changed[first]
    changed[second] = dataclasses.replace(changed[second], magnitude=changed[second].magnitude * 1.001)  # type: ignore[operator]
    changed[rest[0]] = random_pair("linear", torch.ones(3, 3))
    rows = TokenRows((1,), torch.ones(1, 2))
    two = dataclasses.replace(one, pairs=changed, extras={"a": torch.ones(1)}, token_rows={"e": rows})
    found = compare_adapters(one, two)
    assert not found.equal and len(found.problems) == 5
    named = (f"{first} is in one", f"{second} has another magnitude", f"{rest[0]} is for a weight")
    for words in (*named, "parameter a", "token rows e"):
        assert any(words in problem for problem in found.problems)
    assert compare_adapters(one, one).equal
    off = dataclasses.replace(one.pairs[first], alpha=one.pairs[first].alpha * 1.00001)
    assert not compare_adapters(Adapter({first: one.pairs[first]}), Adapter({first: off})).equal

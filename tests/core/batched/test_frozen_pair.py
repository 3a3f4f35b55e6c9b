"""A frozen pair computes what any pair does, owns nothing but its numbers, and refuses what would reach other pairs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lorakeet.core.adapter import Pair
from lorakeet.core.base import DenseBase
from lorakeet.core.batched.frozen_pair import FrozenPair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry

ENTRY = PlanEntry("layer", "linear", (7, 5), rank=4, alpha=12.0)


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 5), torch.randn(7, 4)


def test_it_is_the_pair_of_its_numbers_without_a_copy() -> None:
    A, B = numbers()
    plain = LoraPair(ENTRY)
    plain.load(Pair(A, B, 12.0))
    frozen = FrozenPair(A, B, ENTRY.scale)
    x, base = torch.randn(3, 5), DenseBase(nn.Linear(5, 7, bias=False))
    assert torch.equal(frozen(x, base), plain(x, base)) and torch.equal(frozen.delta(), plain.delta())
    assert frozen.A is A and frozen.B is B and frozen.plain and frozen.rank == 4
    value = frozen.value()
    assert (value.alpha, value.kind, value.scale_rule) == (12.0, "linear", "alpha/rank") and torch.equal(value.A, A)
    assert [*frozen.state_dict()] == [*dict(frozen.named_buffers())] == ["A", "B"] and not [*frozen.parameters()]
    assert not frozen.training and not frozen.train().eval().training


@pytest.mark.parametrize(
    "change",
    [
        lambda pair: pair.register_forward_hook(print),
        lambda pair: pair.register_forward_pre_hook(print),
        lambda pair: pair.register_full_backward_hook(print),
        lambda pair: pair.register_state_dict_pre_hook(print),
        lambda pair: pair.add_module("more", nn.Linear(1, 1)),
    ],
)
def test_nothing_can_be_put_where_others_would_find_it(change: Any) -> None:
    one, other = (FrozenPair(*numbers(), 3.0) for _ in range(2))
    with pytest.raises(TypeError, match="a frozen pair shares its tables with others"):
        change(one)
    with pytest.raises(AttributeError):
        one.more = nn.Parameter(torch.ones(1))
    assert all(not table for table in vars(FrozenPair).values() if isinstance(table, dict | frozenset))
    assert [*other.modules()] == [other] and not [*other.parameters()]


def test_what_one_has_the_others_have_not() -> None:
    one, other = FrozenPair(*numbers(), 3.0), FrozenPair(*numbers(), 2.0, "conv1d", "alpha/sqrt(rank)")
    one.double()
    assert one.A.dtype is torch.float64 and other.A.dtype is torch.float32
    assert (one.scale, one.kind, one.scale_rule) == (3.0, "linear", "alpha/rank")
    assert (other.scale, other.kind, other.scale_rule) == (2.0, "conv1d", "alpha/sqrt(rank)")
    one.A = torch.ones(1, 1)
    one.register_buffer("more", torch.ones(1))
    assert one.A.numel() == 1 and set(one.state_dict()) == {"A", "B", "more"} and set(other.state_dict()) == {"A", "B"}
    with pytest.raises(TypeError, match="a frozen pair shares its tables"):
        one.register_buffer("passing", torch.ones(1), persistent=False)
    twin = copy.deepcopy(other)
    assert type(twin) is FrozenPair and twin.A is not other.A and torch.equal(twin.delta(), other.delta())

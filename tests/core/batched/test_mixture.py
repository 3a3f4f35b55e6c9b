"""The pairs of a mix, their factors, and when a copy of them is old."""

from __future__ import annotations

import torch
from torch import nn

from lorakeet.core.batched.frozen_pair import FrozenPair
from lorakeet.core.batched.mixture import CopySource, all_plain, factors_of, mixtures
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry


def pair() -> LoraPair:
    made = LoraPair(PlanEntry(path="w", kind="linear", shape=(6, 4), rank=2, alpha=6.0)).eval()
    with torch.no_grad():
        made.A.normal_(), made.B.normal_()
    return made


def test_a_mix_has_the_pairs_that_layers_have() -> None:
    a, b = pair(), pair()
    assert mixtures((("a", 1.0), ("b", 0.5)), [{"a": a, "b": b}, {"b": b, "c": a}, {}]) == [[(a, 1.0), (b, 0.5)], [(b, 0.5)], []]


def test_factors_are_those_in_use_with_scale_and_weight() -> None:
    trained, frozen = pair(), FrozenPair(torch.ones(1, 4), torch.ones(6, 1), 2.0)
    (A, B, scale), (other, _, twice) = factors_of([(trained, 0.5), (frozen, 3.0)])
    assert torch.equal(A, trained.A) and torch.equal(B, trained.B) and not A.requires_grad and scale == 1.5
    assert other is frozen.A and twice == 6.0
    special = pair()
    special.bias = nn.Parameter(torch.ones(6))
    assert factors_of([(frozen, 1.0), (special, 1.0)]) == [] and not all_plain([(special, 1.0)]) and all_plain([(trained, 1.0)])


def test_a_copy_is_old_when_what_it_was_made_of_is_written_to() -> None:
    trained, frozen, what = pair(), FrozenPair(torch.ones(1, 4), torch.ones(6, 1), 2.0), ((("a", 1.0),), (1,))
    copied = CopySource.of(what, [[(trained, 1.0)], [(frozen, 1.0)]])
    assert copied.stands_for(what) and not copied.stands_for(((("a", 1.0),), (2,)))
    frozen.A.add_(1)
    assert copied.stands_for(what), "nobody writes to a frozen one"
    with torch.no_grad():
        trained.B.add_(1)
    assert not copied.stands_for(what)

"""One Selection for many layers: switching, dividing a batch, units of several tokens, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core.selection import Selection, Share, table_of


def test_dividing_ends_with_the_next_use() -> None:
    selection = Selection()
    selection.divide([Share(0, 2, "a")], units=3)
    assert selection.shares == (Share(0, 2, "a"),)
    selection.use("b")
    assert (selection.active, selection.shares) == ("b", None)


@pytest.mark.parametrize("share", [Share(0, 4, "a"), Share(-1, 2, "a"), Share(2, 2, "a")])
def test_shares_lie_within_the_batch(share: Share) -> None:
    with pytest.raises(ValueError, match="does not lie within a batch of 3"):
        Selection().divide([share], units=3)


def test_a_unit_may_be_several_tokens() -> None:
    selection = Selection()
    selection.divide([Share(0, 1, "a"), Share(1, 3, "b", 0.5)], units=3)
    assert selection.shares_over(3) == selection.shares
    assert selection.shares_over(12) == (Share(0, 4, "a"), Share(4, 12, "b", 0.5))
    with pytest.raises(ValueError, match="13 tokens, which is no multiple of the batch's 3 units"):
        selection.shares_over(13)


def test_a_table_holds_tokens_with_weight_times_scale_and_is_kept() -> None:
    selection = Selection()
    shares = (Share(1, 3, "a"), Share(2, 3, "b", 0.5), Share(0, 2, "gone"))
    selection.divide(shares, units=3)
    layout = (("a", 3.0), ("b", 4.0))
    tokens, factors = selection.table(layout, shares, torch.zeros(0))
    assert tokens.tolist() == [1, 2, 2, 0]
    assert factors.tolist() == [[[3.0], [3.0]], [[2.0], [0.0]]]
    assert selection.table(layout, shares, torch.zeros(0))[0] is tokens
    selection.divide(list(shares), units=3)
    assert selection.table(layout, shares, torch.zeros(0))[0] is tokens, "the same rows write another token"
    selection.divide(shares, units=4)
    assert selection.table(layout, shares, torch.zeros(0))[0] is not tokens


def test_overlapping_shares_add_up() -> None:
    shares = [Share(0, 2, "a", 0.25), Share(0, 1, "a", 0.5)]
    tokens, factors = table_of(shares, (("a", 4.0),), torch.zeros(0, dtype=torch.bfloat16))
    assert (tokens.tolist(), factors.flatten().tolist(), factors.dtype) == ([0, 1], [3.0, 1.0], torch.bfloat16)

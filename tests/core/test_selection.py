"""One Selection for many layers: switching, dividing a batch, units of several tokens, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core.selection import LONG, Arrangement, Selection, Share

CPU = torch.device("cpu")


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


def arranged(shares: list[Share], *, units: int, selection: Selection | None = None) -> Arrangement:
    selection = selection or Selection()
    selection.divide(shares, units=units)
    return selection.arranged(units, CPU)


def test_each_token_of_its_own_mix_is_aligned() -> None:
    found = arranged([Share(0, 1, "a"), Share(1, 2, "b", 0.5), Share(2, 3, "a", 0.5), Share(2, 3, "b", 0.5)], units=3)
    assert found.places == ((("a", 1.0),), (("b", 0.5),), (("a", 0.5), ("b", 0.5)))
    assert found.aligned and found.turns == 1 and not found.long


def test_tokens_that_share_a_mix_or_have_none_are_looked_up() -> None:
    shares = [Share(0, 1, "a"), Share(1, 2, "b"), Share(3, 5, "a"), Share(5, 6, "c")]
    found = arranged(shares, units=6)
    assert not found.aligned and found.turns == 3, "token 2 is bare; a sees three tokens"
    assert found.seen.tolist() == [0, 3, 4, 1, 0, 0, 5, 0, 0]
    assert found.tokens.tolist() == [0, 3, 4, 1, 5]
    assert found.found.tolist() == [0, 1, 2, 3, 6]


def test_many_neighbours_of_one_mix_are_multiplied_by_themselves() -> None:
    long = LONG + 1
    shares = [Share(0, long, "a"), Share(long, long + 1, "b"), Share(long + 1, long + 2, "c")]
    found = arranged(shares, units=long + 2)
    assert found.long == ((slice(0, long), 0),)
    assert (found.turns, found.tokens.tolist()) == (1, [long, long + 1])
    few = arranged([Share(0, 2, "a"), Share(2, 3, "b")], units=3)
    assert few.long == ((slice(0, 2), 0), (slice(2, 3), 1)) and not few.turns


def test_a_mix_keeps_its_place_and_new_ones_take_those_of_the_gone() -> None:
    selection = Selection()
    alone = {name: (name, 1.0) for name in "abcde"}

    def placed(*names: str) -> str:
        shares = [Share(token, token + 1, name) for token, name in enumerate(names)]
        found = arranged(shares, units=len(names), selection=selection)
        assert selection.arranged(len(names), CPU) is found, "worked out once for all layers"
        return "".join(next(name for name, mix in alone.items() if (mix,) == place) for place in found.places)

    assert placed("a", "b", "c") == "abc"
    assert placed("a", "d", "c") == "adc", "aligned still"
    assert placed("c", "a") == "adc", "d has gone, and may come back"
    assert placed("e", "c", "a") == "aec"
    assert placed("e") == "e", "too many would see nothing"
    assert placed("e", "a") == "ea"


def test_the_same_rows_are_arranged_once() -> None:
    selection = Selection()
    shares = [Share(1, 3, "a"), Share(2, 3, "b", 0.5)]
    found = arranged(shares, units=3, selection=selection)
    assert arranged(list(shares), units=3, selection=selection) is found, "the same rows write another token"
    assert arranged(shares, units=4, selection=selection) is not found


def test_units_of_several_tokens_are_arranged_in_tokens() -> None:
    selection = Selection()
    selection.divide([Share(0, 1, "a"), Share(1, 2, "b"), Share(2, 3, "c")], units=3)
    found = selection.arranged(6, CPU)
    assert found.seen.tolist() == [0, 1, 2, 3, 4, 5] and found.turns == 2
    with pytest.raises(ValueError, match="13 tokens, which is no multiple of the batch's 3 units"):
        selection.arranged(13, CPU)


def test_weights_of_overlapping_shares_of_one_adapter_add_up() -> None:
    found = arranged([Share(0, 2, "a", 0.25), Share(0, 1, "a", 0.5)], units=2)
    assert found.places == ((("a", 0.75),), (("a", 0.25),))

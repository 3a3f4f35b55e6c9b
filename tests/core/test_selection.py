"""One Selection for many layers: switching, dividing a batch, units of several tokens, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core.selection import Arrangement, Selection, Share

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


def test_a_token_for_each_place_is_aligned() -> None:
    found = arranged([Share(0, 1, "a"), Share(1, 2, "b", 0.5), Share(2, 3, "a", 0.5), Share(2, 3, "b", 0.5)], units=3)
    assert found.places == ((("a", 1.0),), (("b", 0.5),), (("a", 0.5), ("b", 0.5)))
    assert found.aligned and not found.long


def test_bare_tokens_and_longer_shares_are_looked_up() -> None:
    shares = [Share(0, 1, "a"), Share(1, 2, "b"), Share(3, 5, "a"), Share(5, 6, "a")]
    found = arranged(shares, units=6)
    assert not found.aligned, "token 2 is bare, and two tokens stand together"
    assert len(found.places) == 4 and found.long == ((slice(3, 5), 2),)
    assert found.seen.tolist() == [0, 1, 0, 5]
    assert (found.tokens.tolist(), found.at.tolist()) == ([0, 1, 5], [0, 1, 3])


def test_few_neighbours_are_multiplied_by_themselves() -> None:
    found = arranged([*(Share(token, token + 1, "a") for token in range(5)), Share(5, 6, "b")], units=6)
    assert found.long == ((slice(0, 5), 0),) and found.tokens.tolist() == [5]
    assert found.places == ((("a", 1.0),), (("b", 1.0),)), "one copy of a serves five rows"


def test_a_mix_keeps_its_place_and_new_ones_take_those_of_the_gone() -> None:
    selection = Selection()
    alone = {name: (name, 1.0) for name in "abcdefg"}

    def placed(names: str) -> tuple[str, bool]:
        shares = [Share(token, token + 1, name) for token, name in enumerate(names)]
        found = arranged(shares, units=len(names), selection=selection)
        assert selection.arranged(len(names), CPU) is found, "worked out once for all layers"
        return "".join(next(name for name, mix in alone.items() if (mix,) == place) for place in found.places), found.aligned

    assert placed("abca") == ("abca", True), "two rows of one adapter, a place each"
    assert placed("adca") == ("adca", True)
    assert placed("cad") == ("adca", False), "one a waits"
    assert placed("edca") == ("edca", True), "and goes"
    assert placed("edcaf") == ("edcaf", True)
    assert placed("fdcae") == ("edcaf", False)
    assert placed("gda") == ("gdcaf", False)
    assert placed("ad") == ("ad", True), "too many would see nothing"


def test_the_same_rows_are_arranged_once() -> None:
    selection = Selection()
    shares = [Share(1, 3, "a"), Share(2, 3, "b", 0.5)]
    found = arranged(shares, units=3, selection=selection)
    assert arranged(list(shares), units=3, selection=selection) is found, "the same rows write another token"
    assert arranged(shares, units=4, selection=selection) is not found


def test_units_of_several_tokens_are_arranged_in_tokens() -> None:
    selection = Selection()
    selection.divide([Share(0, 1, "a"), Share(1, 2, "b"), Share(2, 3, "c")], units=3)
    assert selection.arranged(3, CPU).aligned
    found = selection.arranged(6, CPU)
    assert found.long == ((slice(0, 2), 0), (slice(2, 4), 1), (slice(4, 6), 2)) and not len(found.tokens)
    with pytest.raises(ValueError, match="13 tokens, which is no multiple of the batch's 3 units"):
        selection.arranged(13, CPU)


def test_weights_of_overlapping_shares_of_one_adapter_add_up() -> None:
    found = arranged([Share(0, 2, "a", 0.25), Share(0, 1, "a", 0.5)], units=2)
    assert found.places == ((("a", 0.75),), (("a", 0.25),))

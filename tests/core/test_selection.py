"""One Selection for many layers: switching, dividing a batch, units of several tokens, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core.selection import FEW, PATIENCE, BatchAssignment, Selection, Share

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


def arranged(shares: list[Share], *, units: int, selection: Selection | None = None) -> BatchAssignment:
    selection = selection or Selection()
    selection.divide(shares, units=units)
    return selection.assignment(units, CPU)


def test_each_token_has_the_place_of_its_mix() -> None:
    found = arranged([Share(0, 1, "a"), Share(1, 2, "b", 0.5), Share(2, 3, "a", 0.5), Share(2, 3, "b", 0.5)], units=3)
    assert found.places == ((("a", 1.0),), (("b", 0.5),), (("a", 0.5), ("b", 0.5)))
    assert found.at == ((0, 0), (1, 1), (2, 2)) and found.tokens is None and not found.long


def test_tokens_of_one_mix_share_a_place_and_bare_ones_have_none() -> None:
    found = arranged([Share(0, 1, "a"), Share(1, 2, "b"), Share(3, 5, "a"), Share(5, 6, "a")], units=6)
    assert found.places == ((("a", 1.0),), (("b", 1.0),)), "one copy of a serves four tokens"
    assert found.at == ((0, 0), (1, 1), (3, 0), (4, 0), (5, 0))
    assert found.tokens is not None and found.tokens.tolist() == [0, 1, 3, 4, 5]


def test_many_tokens_of_one_mix_are_multiplied_by_themselves() -> None:
    found = arranged([Share(0, FEW + 1, "a"), Share(FEW + 1, FEW + 3, "b")], units=FEW + 3)
    assert found.long == ((range(FEW + 1), 0),) and [token for token, _ in found.at] == [FEW + 1, FEW + 2]
    found = arranged([Share(token, token + 1, "ab"[token == 1]) for token in range(FEW + 2)], units=FEW + 2)
    ((tokens, place),) = found.long
    assert list(tokens) == [0, *range(2, FEW + 2)] and place == 0
    assert found.at == ((1, 1),)


def test_a_mix_keeps_its_place_and_new_ones_take_those_of_the_gone() -> None:
    selection = Selection()
    alone = {name: (name, 1.0) for name in "abcdefgh"}

    def placed(names: str) -> str:
        shares = [Share(token, token + 1, name) for token, name in enumerate(names)]
        before = selection._places
        found = arranged(shares, units=len(names), selection=selection)
        assert selection.assignment(len(names), CPU) is found, "worked out once for all layers"
        assert (found.places is before) == (found.places == before), "the same places are the same tuple"
        assert all(found.places[place] == (alone[names[token]],) for token, place in found.at)
        assert found.used == {place for _, place in found.at}
        return "".join(next(name for name, mix in alone.items() if (mix,) == place) for place in found.places)

    assert placed("abca") == "abc"
    assert placed("adca") == "adc"
    assert placed("cad") == "adc"
    assert placed("eac") == "aec", "d waits no more"
    assert placed("ecaf") == "aecf"
    assert placed("fc") == "aecf", "a and e may come again"
    assert placed("gfha") == "aghf"
    for _ in range(PATIENCE - 1):
        assert placed("a") == "aghf", "the others may come again"
        selection.divide([], units=1)
    assert placed("a") == "a", "too many would see nothing"


def test_units_of_several_tokens_are_arranged_in_tokens() -> None:
    selection = Selection()
    selection.divide([Share(0, 1, "a"), Share(1, 2, "b"), Share(2, 3, "c")], units=3)
    assert selection.assignment(3, CPU).at == ((0, 0), (1, 1), (2, 2))
    assert selection.assignment(6, CPU).at == ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2))
    with pytest.raises(ValueError, match="13 tokens, which is no multiple of the batch's 3 units"):
        selection.assignment(13, CPU)


def test_weights_of_overlapping_shares_of_one_adapter_add_up() -> None:
    found = arranged([Share(0, 2, "a", 0.25), Share(0, 1, "a", 0.5)], units=2)
    assert found.places == ((("a", 0.75),), (("a", 0.25),))

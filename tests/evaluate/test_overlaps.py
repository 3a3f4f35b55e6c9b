"""What two texts have in common: against sacrebleu, and against the table of the textbook."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.chrf import CHRF

from lorakeet.evaluate.overlaps import chrf, common_length

TEXTS = st.one_of(st.text(max_size=40), st.text("ab ç日\u00a0\n", max_size=40))


@given(TEXTS, TEXTS)
def test_chrf_is_that_of_sacrebleu(reply: str, reference: str) -> None:
    expected = CHRF().sentence_score(reply, [reference]).score / 100
    assert chrf(reply, reference) == pytest.approx(expected, abs=1e-12)


def test_texts_with_nothing_in_common_have_none() -> None:
    assert [chrf("", "a"), chrf("a", ""), chrf("", ""), chrf("ab", "cd"), chrf(" ", "a")] == [0.0] * 5
    assert chrf("the cat", "thecat") == 1.0


@given(st.lists(st.sampled_from("abc"), max_size=70), st.lists(st.sampled_from("abc"), max_size=70))
def test_the_longest_common_subsequence_is_that_of_the_table(left: list[str], right: list[str]) -> None:
    before = [0] * (len(right) + 1)
    for item in left:
        row = [0]
        for place, other in enumerate(right):
            row.append(before[place] + 1 if item == other else max(before[place + 1], row[place]))
        before = row
    assert common_length(left, right) == before[-1]

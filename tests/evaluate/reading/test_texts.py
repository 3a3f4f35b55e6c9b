"""One form of a text, its words, and the only fenced block."""

from __future__ import annotations

import pytest

from lorakeet.evaluate.reading.texts import bare, plain, unfenced, words


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("10²", "10^2"), ("m²", "m2"), ("1½", "1 1/2"), ("Ａ−５", "A-5"), ("H₂O", "H2O"), ("ﬁn", "fin"), ("①", "①"),
        ("5\u00a0€", "5 €"), ("٣٫٥", "3٫5"),
    ],
)  # fmt: skip
def test_compatible_signs_have_one_form_where_the_value_stays(text: str, form: str) -> None:
    assert plain(text) == form


def test_bare_words() -> None:
    assert bare("**Well-known:** the (A+) x-y, 2024-01-02, 12:30!") == "Well known the A + x y 2024 - 01 - 02 12 : 30"
    assert words("甲乙 don't") == ["甲", "乙", "don't"]


def test_only_one_block_is_the_answer() -> None:
    block = "```\na\n```"
    assert unfenced(block) == unfenced(f"Here:\n{block}\nDone") == "a\n"
    assert unfenced(f"{block}\n{block}") == f"{block}\n{block}"
    assert unfenced(f"Here:\n{block}", anywhere=False) == f"Here:\n{block}"

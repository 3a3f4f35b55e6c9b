"""Numbers of texts, and the decimal mark of a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.evaluate.reading.numbers import decimal_mark, numbers_in, whole_number


@pytest.mark.parametrize(
    ("texts", "mark"),
    [
        (["1,5", "2,25"], ","), (["1.5"], "."), (["1.234,5"], ","), (["1,234.5"], "."), (["1.234.567"], ","),
        (["1,234,567"], "."),        (["1.234"], "."), (["12", "none"], "."), (["1 234,5 €"], ","), (["1.5", "2.5", "3,5"], "."),
    ],
)  # fmt: skip
def test_the_decimal_mark_is_what_the_numbers_can_only_mean(texts: list[str], mark: str) -> None:
    assert decimal_mark(texts) == mark


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from([(".", ","), (",", "."), (",", " "), (",", "\u202f"), (".", "'"), (".", "")]),
    st.integers(0, 2),
)
def test_a_number_is_read_however_its_thousands_are_parted(value: int, marks: tuple[str, str], digits: int) -> None:
    decimal, group = marks
    text = decimal.join(part.replace(",", group) for part in f"{value / 10**digits:,.{digits}f}".split("."))
    found = whole_number(text, decimal)
    assert found is not None and found.value == pytest.approx(value / 10**digits)


def test_dates_and_versions_are_no_numbers_and_lists_are_several() -> None:
    assert [one.value for one in numbers_in("on 12.03.2024 with v1.2.3: 1,2,3 and 10-12", ".")] == [1, 2, 3, 10, 12]


def test_a_number_too_large_to_subtract_is_none() -> None:
    assert not list(numbers_in(f"1e999 {'9' * 400}", "."))
    assert next(one.value for one in numbers_in(f"7 8e{'9' * 5000}", ".")) == 7
    assert [one.value for one in numbers_in("9e99", ".")] == [9e99]


def test_units_stand_before_or_behind() -> None:
    found = [(one.value, one.unit) for one in numbers_in("€5, 5 €, 12%, 3 km/h, EUR 7, 21 °C", ".")]
    assert found == [(5, "€"), (5, "€"), (12, "%"), (3, "km/h"), (7, "€"), (21, "°c")]

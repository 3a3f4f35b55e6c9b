"""Units and formulas of which another case is another one."""

from __future__ import annotations

import pytest

from lorakeet.evaluate.reading.letter_case import are_formulas, case_differs, is_formula, other_unit


@pytest.mark.parametrize(
    ("one", "other", "another"),
    [
        ("MW", "mW", True), ("mg", "Mg", True), ("mS", "ms", True), ("nM", "nm", True), ("mW/L", "MW/L", True), ("ms", "m", True),
        ("KG", "kg", False), ("MM", "mm", False), ("l", "L", False), ("KB", "kB", False), ("μg", "ug", False), ("H", "h", False),
        ("T", "t", False), ("M", "m", False), ("B", "b", False), ("S", "s", False),
        ("stars", "Stars", False), ("", "mW", False),
    ],
)  # fmt: skip
def test_two_units_differ_where_both_exist(one: str, other: str, another: bool) -> None:
    assert other_unit(one, other) is other_unit(other, one) is another


def test_a_unit_stands_behind_a_number_or_a_stroke() -> None:
    assert case_differs(["5", "MW"], ["5", "mW"], formulas=False)
    assert case_differs(["5", "kg", "/", "ML"], ["5", "kg", "/", "mL"], formulas=False)
    assert not case_differs(["$", "1", ".", "5", "MT"], ["$", "1", ".", "5", "mT"], formulas=False)
    assert not case_differs(["USD", "5", "MT"], ["usd", "5", "mT"], formulas=False)
    assert not case_differs(["the", "MS"], ["the", "ms"], formulas=False)
    assert case_differs(["CO"], ["Co"], formulas=True) and not case_differs(["CO"], ["co"], formulas=True)


def test_formulas_are_read_with_charge_and_state() -> None:
    assert all(map(is_formula, ("H2O", "Fe3+", "SO4^2-", "Ca(OH)2", "CuSO4·5H2O", "NaCl(aq)", "CO")))
    assert not any(map(is_formula, ("", "Yes", "water", "co", "2H", "H2O is water")))
    assert are_formulas(("CO", "H2O", "NaCl"), 0.9) and not are_formulas(("B", "C", "F"), 0.9)

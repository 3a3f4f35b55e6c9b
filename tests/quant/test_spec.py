"""The settings of quantisation: defaults, and what is refused."""

from __future__ import annotations

import pytest

from lorakeet.quant import nf4
from lorakeet.quant.spec import NF4_BLOCK_SIZES, QuantSpec


def test_nothing_is_quantised_unless_asked_for() -> None:
    assert QuantSpec().method == "none" and QuantSpec().validate() == []


@pytest.mark.parametrize("size", [0, 48, 2048])
def test_a_block_size_that_is_none_is_refused_with_the_ones_that_are(size: int) -> None:
    (problem,) = QuantSpec(method="nf4", block_size=size).validate()
    assert str(size) in problem and "32, 64" in problem


def test_int8_products_are_for_weights_in_int8() -> None:
    assert QuantSpec(method="int8", int8_products=True).validate() == []
    assert QuantSpec(method="none", int8_products=True).validate() == []  # of a folder that is stored in int8
    (problem,) = QuantSpec(method="nf4", int8_products=True).validate()
    assert "nf4" in problem and "Set the method to int8" in problem


def test_settings_and_code_know_the_same_block_sizes() -> None:
    assert NF4_BLOCK_SIZES == nf4.BLOCK_SIZES

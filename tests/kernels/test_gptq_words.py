"""`kernels.gptq_words`: the formula gives the numbers that the base's own unpacking gives."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from lorakeet.memory.ledger import Ledger
from lorakeet.quant.gptq import BITS
from tiny.gptq_base import base


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_format", ["gptq", "gptq_v2"])
def test_the_formula_is_that_of_the_base(bits: int, zero_format: Literal["gptq", "gptq_v2"]) -> None:
    weight = base(bits, zero_format)
    words = weight.gptq_words()
    if (bits, zero_format) == (3, "gptq"):
        assert words is None, "one less in fields across words"
        return
    assert words is not None
    expected = weight.unpack_by_torch(torch.zeros(weight.shape), 0)
    assert torch.equal(words.by_formula().t(), expected) and expected.unique().numel() > 100


@pytest.mark.parametrize("bits", BITS)
def test_the_formula_takes_a_few_numbers_a_code(bits: int) -> None:
    """It runs beside a model on a GPU, before a kernel's first use, and no plan counts it: a number for each bit was 1 GB in
    weights of 8 bits and 28,672 columns in groups of 32."""
    with Ledger() as ledger:
        words = base(bits, "gptq_v2", (256, 2048)).gptq_words()
        assert words is not None
        before = ledger.bytes
        with ledger.phase("formula"):
            words.by_formula()
    assert ledger.peaks["formula"].bytes - before <= 20 * 256 * 2048

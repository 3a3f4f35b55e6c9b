"""Codes in words: against a naive reading of the format's description, bit by bit, for every width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.quant import gptq_pack
from lorakeet.quant.gptq_pack import (
    BITS,
    ZeroFormat,
    pack_words,
    pack_zeros,
    unpack_word_rows,
    unpack_words,
    unpack_zeros,
    words_for,
)

every_width = pytest.mark.parametrize("bits", BITS)


def naive(words: Tensor, bits: int) -> Tensor:
    """Code k is made of the bits k·bits … of the column's stream of words, lowest bit first."""
    columns = []
    for column in words.t().tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column))
        columns.append([(stream >> (bits * place)) & (2**bits - 1) for place in range(len(column) * 32 // bits)])
    return torch.tensor(columns).t()


@every_width
def test_words_hold_the_stream(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    codes[0], codes[-1] = 2**bits - 1, 2**bits - 1  # the top bit of the last word makes it negative
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (64 * bits // 32, 5) and bool((words < 0).any())
    assert torch.equal(naive(words, bits), codes)
    assert torch.equal(unpack_words(words, bits).long(), codes)
    assert torch.equal(unpack_word_rows(words.t().contiguous(), bits).long(), codes.t())


@every_width
def test_many_columns_are_packed_a_few_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (64, 37), generator=torch.Generator().manual_seed(bits))
    whole = pack_words(codes, bits)
    monkeypatch.setattr(gptq_pack, "TILE", 640)
    assert torch.equal(pack_words(codes, bits), whole)


@every_width
@pytest.mark.parametrize("zero_format", ["gptq", "gptq_v2"])
def test_zero_points_come_back_also_0_and_the_highest(bits: int, zero_format: ZeroFormat) -> None:
    zeros = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    zeros[0], zeros[1] = 0, 2**bits - 1
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits, zero_format), bits, zero_format).long(), zeros)


@every_width
def test_format_gptq_keeps_one_less(bits: int) -> None:
    zeros = torch.randint(1, 2**bits, (3, 32), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(naive(pack_zeros(zeros, bits, "gptq").t(), bits).t(), zeros - 1)
    assert torch.equal(naive(pack_zeros(zeros, bits, "gptq_v2").t(), bits).t(), zeros)


def test_three_bits_fill_whole_words_only_by_the_32() -> None:
    assert words_for(32, 3) == 3 and words_for(16, 3) is None and words_for(16, 4) == 2
    with pytest.raises(ValueError, match="16 codes of 3 bits"):
        pack_words(torch.zeros(16, 2, dtype=torch.uint8), 3)

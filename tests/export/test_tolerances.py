"""`export.tolerances`: the coarsest type that counts decides."""

from __future__ import annotations

import itertools

from lorakeet.export.tolerances import BF16, F16, F32, PRECISIONS, Q4, Q6, Q8, allowed_for, row_of


def test_the_coarsest_type_that_counts_decides() -> None:
    assert allowed_for({"F32": 10}) is F32 and allowed_for({}) is F32
    assert allowed_for({"Q8_0": 97, "F16": 3}) is Q8
    assert allowed_for({"Q6_K": 40, "Q4_K": 60}) is Q4 and allowed_for({"Q6_K": 99, "Q4_K": 1}) is Q6
    assert row_of("IQ4_NL") is Q4 and row_of("BF16") is BF16 and row_of("MXFP4") is Q4


def test_fewer_bits_are_never_judged_more_strictly() -> None:
    rows = [F32, F16, BF16, *(PRECISIONS[f"{bits}-bit"] for bits in (8, 6, 5, 4, 3, 2))]
    for finer, coarser in itertools.pairwise(rows):
        assert finer.rounding < coarser.rounding and finer.share < coarser.share and finer.gap < coarser.gap
        assert finer.parity.mean_kl < coarser.parity.mean_kl and finer.parity.top1_agreement >= coarser.parity.top1_agreement

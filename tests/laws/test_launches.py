"""What a block of an 8B model launches on a card, in both passes, is bounded. Counted on shapes by benchmarks/launches.py."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lorakeet.kernels import blockwise_rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODEL, TOKENS = "meta-llama/Llama-3.1-8B", 2048
MOST = {"none": 105, "nf4": 145}  # launches of a block by its base


@cache
def counter() -> dict[str, Any]:
    """The names of benchmarks/launches.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return runpy.run_path(str(BENCHMARKS / "launches.py"))


@cache
def of_block(kernels: str, base: str = "none") -> list[dict[str, float]]:
    """What a block adds to the launches of a step's first micro-batch, and of a later one, by name."""
    few, more = (counter()["counts_of"](MODEL, blocks, TOKENS, kernels, base) for blocks in (1, 2))
    return [
        {name: count - one[name] for name, count in other.items() if count != one[name]}
        for one, other in ((each.torch + each.triton, its.torch + its.triton) for each, its in zip(few, more, strict=True))
    ]


@pytest.mark.parametrize("base", MOST)
def test_a_block_launches_at_most_so_many_kernels(base: str) -> None:
    first, later = of_block("fused", base)
    assert sum(first.values()) <= MOST[base] and sum(later.values()) <= MOST[base], (first, later)


def test_copies_of_pairs_are_made_once_a_pass() -> None:
    """A and B are cast, in stacks; a later micro-batch of a step adds to the gradients of seven pairs."""
    for each in of_block("fused"):
        assert each["_to_copy"] == 11 and each["cat"] == 2, "four stacks of A and seven Bs"
    assert of_block("fused")[1]["add_"] == 14


def test_a_product_is_one_launch() -> None:
    """Seven weights, both ways; h, u, ∂A and ∂B; x·W and ∂x of layers with the same input are added where they are computed."""
    _, later = of_block("fused")
    assert later["mm"] + later["addmm_"] == 2 * 7 + 4 + 7 + 7 + 4 + 7 + 4


def test_attention_of_a_block_launches_at_most_so_many_kernels() -> None:
    """Sinks add five to a kernel's eight. Blocks of queries launch for each row of up to 724 tokens, which is a block; a longer
    one has several. Of places, which are shapes here, nothing is kept for a pass over numbers."""
    attention_of, flash, sinks, blocks = counter()["attention_of"], *counter()["ATTENTION"]
    assert attention_of(flash, TOKENS, 512).launches == 8 and attention_of(sinks, TOKENS, 512).launches == 13
    few, more = (attention_of(blocks, tokens, 512) for tokens in (TOKENS // 2, TOKENS))
    each = (more.launches - few.launches) / (TOKENS // 2 / 512)
    assert more.torch["bmm"] == 7 * TOKENS // 512, "two products forward, five back, and no other of them hides"
    assert each <= 35 and more.launches <= 151 and attention_of(blocks, TOKENS, TOKENS).launches <= 186
    assert "blockwise_rows" not in more.torch and more.seconds > 10 * attention_of(flash, TOKENS, 512).seconds
    assert blockwise_rows.keys_seen.cache_info().currsize == 0


def test_a_weight_in_nf4_takes_three_launches() -> None:
    """Fourteen matrices: the block maxima from their codes, their mean, and W."""
    for dense, packed in zip(of_block("fused"), of_block("fused", "nf4"), strict=True):
        assert packed["NF4 by bitsandbytes"] == 3 * 14
        assert sum(packed.values()) == sum(dense.values()) + 42

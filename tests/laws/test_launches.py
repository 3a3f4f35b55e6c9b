"""What a block of an 8B model launches on a card, in both passes, is bounded. Counted on shapes by benchmarks/launches.py."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.kernels import blockwise_rows, nf4_maxima
from lorakeet.kernels.nf4_maxima import SharedMaxima
from lorakeet.quant.nf4 import Nf4Base, decode_maxima_together

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODEL, TOKENS = "meta-llama/Llama-3.1-8B", 2048
MOST = {"none": 90, "nf4": 110}  # launches of a block by its base: 141 for a dense one before A and B were copied once a step


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


def test_copies_of_pairs_are_made_once_a_step() -> None:
    """The first micro-batch casts A and B, in stacks; a later one casts nothing, and adds to the gradients of seven pairs."""
    first, later = of_block("fused")
    assert first["_to_copy"] == 11 and first["cat"] == 2, "four stacks of A and seven Bs"
    assert "_to_copy" not in later and "cat" not in later and later["add_"] == 14


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


def test_block_maxima_are_decoded_once_a_pass() -> None:
    """Fourteen matrices, a launch each; three launches for the maxima of all seven, each way (kernels/nf4_maxima)."""
    for dense, packed in zip(of_block("fused"), of_block("fused", "nf4"), strict=True):
        assert packed["NF4 by bitsandbytes"] == 14 + 2 * 3
        assert sum(packed.values()) == sum(dense.values()) + 20


def test_the_code_decodes_as_often_as_the_counter_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of seven weights, forward and back: the maxima of the last block serve both its passes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra lorakeet[cuda], is not installed")
    import bitsandbytes  # noqa: F401 - it registers its operators

    decode, found = SharedMaxima.decode, list[int]()

    def counted(self: SharedMaxima) -> Tensor:
        with Operations() as operations:
            made = decode(self)
        found.append(len(operations.names))
        return made

    monkeypatch.setattr(SharedMaxima, "decode", counted)
    monkeypatch.setattr(nf4_maxima, "AGREED", {torch.device("cpu"): True})  # the CPU stands for a GPU
    blocks = [[Nf4Base.of(torch.randn(24, 64)) for _ in range(7)] for _ in range(2)]
    for block in blocks:
        decode_maxima_together(block)
    bases = [base for block in blocks for base in block]
    for base in (*bases, *bases[::-1]):
        codes = base.nf4_codes(0, 24)
        assert codes is not None and codes.decoded is not None
        torch.testing.assert_close(codes.decoded(), base.block_maxima(0, 24))
    assert found == 3 * [counter()["OF_MAXIMA"]]


class Operations(TorchDispatchMode):
    """The operations that launch kernels, as benchmarks/launches.py has them, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        self.names += [name] * (name not in counter()["QUIET"])
        return func(*args, **(kwargs or {}))

"""GGUF blocks against the gguf package's reference, to the bit, on random bytes: every code and scale that a file may hold."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from lorakeet.errors import EnvironmentProblem
from lorakeet.quant.gguf import BLOCK_TYPES, GgufBase, row_bytes

ROWS, WIDTH = 5, 512
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
HALVES = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q6_K": (208,)}  # where a block has fp16 numbers; the others at 0 and 2


def random_base(kind: str) -> GgufBase:
    """Random bytes; the fp16 scales are small numbers, neither infinite nor NaN."""
    random = np.random.default_rng(0)
    base = GgufBase((ROWS, WIDTH), kind)
    blocks = random.integers(0, 256, (base.packed.numel() // BLOCK_TYPES[kind].bytes, BLOCK_TYPES[kind].bytes), dtype=np.uint8)
    for place in HALVES.get(kind, (0, 2)):
        scales = (random.standard_normal(len(blocks)) * 0.1).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    base.packed.copy_(torch.from_numpy(blocks).view(base.packed.shape))
    return base


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_unpacks_to_the_reference_bit_for_bit(kind: str) -> None:
    base = random_base(kind)
    expected = quants.dequantize(base.packed.numpy(), GGMLQuantizationType[kind])
    assert np.array_equal(base.dense().numpy(), expected)
    narrow = base.unpack(torch.empty(ROWS, WIDTH, dtype=torch.bfloat16))
    assert torch.equal(narrow, torch.from_numpy(expected).bfloat16()), "rounded once"


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_block_sizes_are_ggmls(kind: str) -> None:
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (BLOCK_TYPES[kind].size, BLOCK_TYPES[kind].bytes)


@pytest.mark.parametrize("kind", WRITTEN)
def test_store_rounds_as_the_reference_does(kind: str) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    base = GgufBase((ROWS, WIDTH), kind)
    base.store(weight)
    assert np.array_equal(base.packed.numpy(), quants.quantize(weight.numpy(), GGMLQuantizationType[kind]))
    assert (base.dense() - weight).abs().mean() < 0.2


def test_k_types_say_who_writes_them() -> None:
    with pytest.raises(EnvironmentProblem, match="Q4_K can be read and trained on"):
        GgufBase((ROWS, WIDTH), "Q4_K").store(torch.zeros(ROWS, WIDTH))


def test_widths_are_whole_blocks_and_types_are_known() -> None:
    assert row_bytes(576, "Q4_1") == 18 * 20
    with pytest.raises(ValueError, match=r"576 numbers is no whole number of Q4_K blocks"):
        GgufBase((4, 576), "Q4_K")
    with pytest.raises(ValueError, match="Q4_0, Q4_1"):
        GgufBase((4, 512), "IQ2_XS")


def test_settings_describe_it() -> None:
    assert random_base("Q6_K").settings == {"method": "gguf", "shape": [ROWS, WIDTH], "type": "Q6_K"}
    assert random_base("Q6_K").bytes == ROWS * 420

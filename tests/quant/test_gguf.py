"""GGUF blocks against the gguf package's reference, to the bit, and by step, offset and code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from lorakeet.errors import EnvironmentProblem
from lorakeet.quant.gguf import BLOCK_TYPES, GgufBase, row_bytes
from lorakeet.quant.gguf_codes import HIGHEST, K_TYPES, fit_gguf_scales, inverted, nearest_codes, steps, with_codes

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


def weight(rows: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def wide(base: GgufBase) -> tuple[Tensor, Tensor]:
    step, offset = steps(base)
    size = base.shape[1] // step.shape[1]
    return step.repeat_interleave(size, 1), offset.repeat_interleave(size, 1)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_codes_are_read_back_as_step_times_code_less_offset(kind: str) -> None:
    base = fit_gguf_scales(weight(), kind)
    codes = torch.randint(0, HIGHEST[kind] + 1, base.shape, generator=torch.Generator().manual_seed(1))
    step, offset = wide(base)
    changed = with_codes(base, codes.to(torch.uint8))
    torch.testing.assert_close(changed.dense(), step * codes - offset, rtol=1e-5, atol=1e-6)
    assert torch.equal(wide(changed)[0], step) and torch.equal(wide(changed)[1], offset)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_nearest_codes_of_what_a_block_means_are_its_own(kind: str) -> None:
    base = fit_gguf_scales(weight(), kind)
    step, offset = wide(base)
    codes = nearest_codes(base.dense(), inverted(step), offset, HIGHEST[kind])
    assert torch.equal(with_codes(base, codes.to(torch.uint8)).packed, base.packed)


@pytest.mark.parametrize("kind", K_TYPES)
def test_fitted_k_blocks_are_as_near_as_their_bits_allow(kind: str) -> None:
    """No number is off by more than about half a step, and gguf's own reader reads the same numbers."""
    import gguf

    exact = weight()
    exact[0] = exact[0].abs() + 0.1  # a range that does not hold 0 by itself
    exact[1] = 0
    base = fit_gguf_scales(exact, kind)
    off = (base.dense() - exact).abs()
    step, _ = wide(base)
    assert float((off - 0.5 * step.abs()).max()) < {"Q4_K": 6e-3, "Q5_K": 6e-3, "Q6_K": 1e-3}[kind]
    assert float(off[2:].norm() / exact[2:].norm()) < {"Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03}[kind]
    assert bool((base.dense()[1] == 0).all())
    theirs = gguf.quants.dequantize(base.packed.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(theirs), base.dense())

"""MXFP4: each number is its level times the power of two of its group, exactly."""

from __future__ import annotations

import torch

from lorakeet.quant.mxfp4 import unpack_mxfp4, unpacked_shape
from tiny.float_folders import by_hand


def test_each_number_is_its_level_times_a_power_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 140, (2, 3, 2), dtype=torch.uint8, generator=generator)
    found = unpack_mxfp4(blocks, scales)
    assert found.dtype == torch.bfloat16 and tuple(found.shape) == unpacked_shape(tuple(blocks.shape)) == (2, 3, 64)
    assert torch.equal(found.float(), by_hand(blocks, scales))


def test_the_numbers_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 4, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 130, (3, 4, 2), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, scales)  # (experts, columns, rows)
    assert torch.equal(unpack_mxfp4(blocks, scales), theirs.transpose(1, 2))

"""MXFP4: each number is its level times the power of two of its group, exactly."""

from __future__ import annotations

import torch

from lorakeet.quant.mxfp4 import GROUP, LEVELS, Mxfp4Base, unpack_mxfp4, unpacked_shape
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


def test_a_matrix_is_unpacked_from_any_row() -> None:
    generator = torch.Generator().manual_seed(2)
    base = Mxfp4Base((6, 64))
    base.packed.copy_(torch.randint(0, 256, (6, 32), dtype=torch.uint8, generator=generator))
    base.scale.copy_(torch.randint(100, 130, (6, 2), dtype=torch.uint8, generator=generator))
    wanted = by_hand(base.packed.view(1, 6, 2, 16), base.scale[None])[0]
    assert torch.equal(base.dense(), wanted)
    assert torch.equal(base.unpack(torch.empty(3, 64, dtype=torch.bfloat16), first=2).float(), wanted[2:5])
    x = torch.randn(3, 64, generator=generator)
    torch.testing.assert_close(base.matmul(x), x @ wanted.t())


def test_what_is_stored_is_rounded_to_the_nearest_level() -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 5)[:, None]
    weight[2, GROUP : 2 * GROUP] = 0
    base = Mxfp4Base((5, 96))
    base.store(weight)
    found = base.dense().unflatten(1, (-1, GROUP))
    groups = weight.unflatten(1, (-1, GROUP))
    power = torch.exp2(groups.abs().amax(-1, keepdim=True).clamp_min(1e-38).log2().floor() - 2)
    every = power[..., None] * torch.tensor(sorted(set(LEVELS)))
    nearest = (every - groups[..., None]).abs().amin(-1)
    torch.testing.assert_close((found - groups).abs(), nearest)
    assert torch.equal(base.dense()[2, GROUP : 2 * GROUP], torch.zeros(GROUP))
    again = Mxfp4Base((5, 96))
    again.store(base.dense())
    assert torch.equal(again.dense(), base.dense())

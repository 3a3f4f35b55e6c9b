"""pack-quantized: each number by compressed-tensors' formula, written out code by code; what does not fit is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.quant.construct import empty_base
from lorakeet.quant.pack_quantized import PackQuantizedBase, base_from_words, bits_of, group_size_of, packed_words

ROWS, COLUMNS = 11, 50  # neither fills whole words
CASES = [(4, 16, False, False), (4, 16, True, False), (4, 10, True, True), (8, 50, False, False), (2, 25, True, True)]


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, columns) packed along each row as the documentation says: code i of a word at the bits i·bits on."""
    fields = 32 // bits
    found = torch.zeros(len(codes), -(-codes.shape[1] // fields), dtype=torch.int64)
    for column in range(codes.shape[1]):
        found[:, column // fields] += codes[:, column].long() << (column % fields * bits)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def parts_of(bits: int, size: int, asymmetric: bool, shuffled: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random weight, and its numbers by (value − zero_point) · scale."""
    generator = torch.Generator().manual_seed(bits + size)
    low, groups = -(1 << (bits - 1)), -(-COLUMNS // size)
    values = torch.randint(low, -low, (ROWS, COLUMNS), generator=generator)
    points = torch.randint(low, -low, (ROWS, groups), generator=generator) if asymmetric else torch.zeros(ROWS, groups).long()
    scale = torch.rand(ROWS, groups, generator=generator).bfloat16() + 0.01
    g_idx = torch.arange(COLUMNS) // size
    if shuffled:
        g_idx = g_idx[torch.randperm(COLUMNS, generator=generator)]
    parts = {"_packed": words(values - low, bits), "_scale": scale, "_shape": torch.tensor([ROWS, COLUMNS])}
    if asymmetric:
        parts["_zero_point"] = words((points - low).T, bits).T.contiguous()
    if shuffled:
        parts["_g_idx"] = g_idx.to(torch.int32)
    dense = torch.empty(ROWS, COLUMNS)
    for row in range(ROWS):
        for column in range(COLUMNS):
            group = int(g_idx[column])
            dense[row, column] = (values[row, column] - points[row, group]).float() * scale[row, group].float()
    return parts, dense


@pytest.mark.parametrize("case", CASES)
def test_each_number_is_that_of_the_formula(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, dense = parts_of(*case)
    base = base_from_words(parts, (case[1],))
    assert torch.equal(base.dense(), dense)
    monkeypatch.setattr("lorakeet.quant.packed.TILE", 100)
    assert torch.equal(base.dense(), dense)
    assert torch.equal(base.unpack(torch.empty(4, COLUMNS), 3), dense[3:7])
    assert torch.equal(base.unpack(torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)), dense.bfloat16())


@pytest.mark.parametrize("case", CASES)
def test_buffers_go_through_safetensors_and_products_are_those_of_the_dense_matrix(case: Any, tmp_path: Path) -> None:
    parts, dense = parts_of(*case)
    base = base_from_words(parts, (case[1],))
    save_file(dict(base.named_buffers()), tmp_path / "base.safetensors")
    again = empty_base(base.settings)
    again.load_state_dict(load_file(tmp_path / "base.safetensors"))
    x, grad = torch.randn(5, COLUMNS), torch.randn(5, ROWS)
    torch.testing.assert_close(again.matmul(x), x @ dense.T)
    torch.testing.assert_close(again.matmul_t(grad), grad @ dense)
    assert again.packed.dtype == torch.int32 and again.packed.nbytes <= parts["_packed"].nbytes


def test_zero_points_of_older_files_and_one_scale_in_all() -> None:
    parts, dense = parts_of(4, 16, True, False)
    low, points = -8, []
    for row in range(ROWS):
        word = parts["_zero_point"][row // 8].long() & 0xFFFFFFFF
        points.append(((word >> (row % 8 * 4)) & 15) + low)
    parts["_zero_point"] = torch.stack(points).to(torch.int8)
    assert torch.equal(base_from_words(parts, (16,)).dense(), dense)
    parts, _ = parts_of(4, COLUMNS, False, False)
    one = base_from_words({**parts, "_scale": torch.tensor([0.5])}, ())
    assert one.groups == 1 and torch.equal(one.dense() * 2, one.dense().mul(2).round())
    unfilled = {**parts_of(4, 16, False, False)[0], "_g_idx": torch.full((COLUMNS,), -1, dtype=torch.int32)}
    assert base_from_words(unfilled, (16,)).size == 16


def test_a_weight_is_stored_to_half_a_step() -> None:
    base = base_from_words(parts_of(4, 16, True, False)[0], (16,))
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    base.store(weight)
    step = base.scale.repeat_interleave(16, dim=1)[:, :COLUMNS]
    assert bool(((base.dense() - weight).abs() <= step * 0.51).float().mean() > 0.95)
    with pytest.raises(ValueError, match=r"the weight is \(2, 2\)"):
        base.store(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("changes", "words_said"),
    [
        ({"_packed": torch.zeros(ROWS, 9, dtype=torch.int32)}, "weight_packed is"),
        ({"_packed": torch.zeros(ROWS, 7, dtype=torch.int64)}, r"weight_packed is torch.int64; expected torch.int32"),
        ({"_packed": torch.zeros(ROWS, 7)}, r"weight_packed is torch.float32; expected torch.int32"),
        ({"_scale": torch.ones(ROWS, 3)}, "weight_scale is"),
        ({"_scale": torch.ones(ROWS + 1, 4)}, "weight_scale is"),
        ({"_zero_point": torch.zeros(3, 3, dtype=torch.int32)}, "weight_zero_point is"),
        ({"_g_idx": torch.full((COLUMNS,), 4, dtype=torch.int32)}, "weight_g_idx does not name"),
        ({"_shape": torch.tensor([ROWS])}, "weight_shape has 1"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Tensor], words_said: str) -> None:
    parts, _ = parts_of(4, 16, False, False)
    with pytest.raises(ValueError, match=words_said):
        base_from_words({**parts, **changes}, (16,))


def test_sizes() -> None:
    assert packed_words(50, 4) == 7 and bits_of(50, 7) == 4 and bits_of(50, 13) == 8 and bits_of(50, 3) is None
    assert bits_of(8, 1) == 2 and bits_of(8, 1, (4,)) == 4 and bits_of(8, 1, (3, 16)) == 2, "what the settings name comes first"
    assert group_size_of(96, 2, (64,)) == 64 and group_size_of(96, 2, ()) == 48 and group_size_of(50, 3, ()) is None
    with pytest.raises(ValueError, match="bits is 3; expected one of 2, 4, 8"):
        PackQuantizedBase((8, 32), bits=3, groups=1, size=32)

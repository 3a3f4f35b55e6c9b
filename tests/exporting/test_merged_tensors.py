"""Exported tensors against merged ones: the share of a change under heavy rounding, and the tolerances."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakeet.core.tiled_product import PART, parts
from lorakeet.exporting.merged_tensors import PART_BYTES, Fp32Rows, MergedTensors, Stack, compare_stored
from lorakeet.exporting.tolerances import BF16, F16, F32, PRECISIONS, Q4, Q6, Q8, allowed_for, precision_said, row_of
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors
from lorakeet.merging.merged_folder import merge_into
from tiny.adapters import random_adapter
from tiny.held import held_bytes
from tiny.models import tiny_model


class Base:
    """One matrix W with the change Δ, and one that nothing changes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(64, 64, generator=generator)
        self.change = 0.05 * torch.randn(64, 64, generator=generator)
        self.names = ["a", "b"]

    def changes(self, name: str) -> bool:
        return name == "a"

    def rows(self, name: str, *, folded: bool = True) -> Tensor:
        return self.weight + self.change if folded and name == "a" else self.weight


@pytest.mark.parametrize("share", [1.0, 0.0, 1 / 3, 3.0])
def test_the_share_is_found_under_noise_larger_than_the_change(share: float) -> None:
    base = Base()
    noise = 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    found = compare_stored(base, [("a", base.weight + share * base.change + noise), ("b", base.weight)])
    assert found["a"].share == pytest.approx(share, abs=5 * found["a"].share_error) and found["a"].share_error < 0.06
    assert math.isnan(found["b"].share) and found["b"].rounding == 0


def test_missing_and_misshapen_tensors_are_infinitely_far() -> None:
    base = Base()
    found = compare_stored(base, [("a", torch.zeros(3)), ("c", torch.zeros(1))])
    assert found["a"].rounding == found["b"].rounding == math.inf and set(found) == {"a", "b"}


class InFile(Base):
    """A file's matrix "b", whole or in parts."""

    def __init__(self, path: Path) -> None:
        self.file, self.names = open_safetensors(path), ["b"]

    def rows(self, name: str) -> Fp32Rows:
        return Fp32Rows(self.file.rows(name))


@pytest.mark.parametrize("shape", [(12_000, 256), (4, 3000, 256)], ids=["matrix", "experts"])
def test_of_a_tensor_that_nothing_changes_a_part_is_held(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of a stack of experts has more numbers than a part."""
    number = 1 << 15
    weight = torch.randn(shape)
    save_tensors(tmp_path / "wide", {"b": weight}, metadata={})
    save_tensors(tmp_path / "narrow", {"b": weight.bfloat16()}, metadata={})
    del weight
    base, given = InFile(tmp_path / "wide"), open_safetensors(tmp_path / "narrow")
    whole = compare_stored(base, [("b", given.read("b"))])["b"]
    monkeypatch.setattr("lorakeet.exporting.merged_tensors.parts", partial(parts, numbers=number))
    with held_bytes() as most:
        found = compare_stored(base, [("b", given.rows("b"))])["b"]
    assert found.rounding == pytest.approx(whole.rounding, rel=1e-9) and 1e-3 < found.rounding < 4e-3
    assert 16 * number < most() <= PART_BYTES // PART * number < 4 * math.prod(shape)


def test_the_coarsest_type_that_counts_decides() -> None:
    assert allowed_for({"F32": 10}) is F32 and allowed_for({}) is F32
    assert allowed_for({"Q8_0": 97, "F16": 3}) is Q8
    assert allowed_for({"Q6_K": 40, "Q4_K": 60}) is Q4 and allowed_for({"Q6_K": 99, "Q4_K": 1}) is Q6
    assert row_of("IQ4_NL") is Q4 and row_of("BF16") is BF16 and row_of("MXFP4") is Q4


def test_fewer_bits_are_never_checked_more_strictly() -> None:
    rows = [F32, F16, BF16, *(PRECISIONS[f"{bits}-bit"] for bits in (8, 6, 5, 4, 3, 2))]
    for finer, coarser in itertools.pairwise(rows):
        assert finer.rounding < coarser.rounding and finer.share < coarser.share and finer.gap < coarser.gap
        assert finer.parity.mean_kl < coarser.parity.mean_kl and finer.parity.top1_agreement >= coarser.parity.top1_agreement


def test_each_tensor_is_that_of_the_merge(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapter = random_adapter(model, "q_proj")
    merge_into(tmp_path / "base", adapter, tmp_path / "merged")
    tensors, written = MergedTensors(tmp_path / "base", adapter), open_safetensors(tmp_path / "merged" / "model.safetensors")
    assert set(tensors.names) == set(written.tensors)
    before = dict(model.state_dict())
    for name in tensors.names:
        assert torch.equal(tensors.rows(name)[:], written.read(name))
        assert torch.equal(tensors.rows(name, folded=False)[:], before[name])
        assert tensors.changes(name) is ("q_proj" in name) and tensors.shape(name) == written.tensors[name].shape


def test_a_stack_is_computed_a_matrix_at_a_time() -> None:
    matrices = torch.arange(24.0).reshape(4, 3, 2)
    computed: list[int] = []

    def matrix(number: int) -> Tensor:
        computed.append(number)
        return matrices[number]

    rows = Stack((4, 3, 2), matrix).as_matrix()
    assert tuple(rows.shape) == (12, 2)
    read = torch.cat([rows[start : start + 2] for start in range(0, 12, 2)])
    assert torch.equal(read, matrices.flatten(0, 1)) and computed == [0, 1, 2, 3]
    assert torch.equal(Stack((4, 3, 2), matrix)[1:3], matrices[1:3])


def test_number_formats_are_known_as_servers_say_them() -> None:
    said = {
        "F16": "float16", "all F32": "float32", "BF16": "bfloat16", "bfloat16": "bfloat16", "half": "float16",
        "Q8_0": "8-bit", "Q6_K": "6-bit", "Q5_K - Small": "5-bit", "Q4_K - Medium": "4-bit", "Q4_K_M": "4-bit",
        "IQ4_NL - 4.5 bpw": "4-bit", "IQ3_S - 3.4375 bpw": "3-bit", "IQ1_S - 1.5625 bpw": "2-bit", "Q2_K - Medium": "2-bit",
        "": "", "auto": "", "unknown, may not work": "", "TQ1_0 - 1.69 bpw ternary": "",
    }  # fmt: skip
    assert {one: precision_said(one) for one in said} == said

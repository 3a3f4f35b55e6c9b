"""The tensors of a file: names that are paths to somewhere, NaN, and factors that are no pair."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakeet.errors import DataError, Problems
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.formats.files.tensors import factor_problem, read_tensors


def test_strange_names_and_values_are_all_named(tmp_path: Path) -> None:
    names = ["../../etc/cron", "a/b.weight", "a..b", "", "a.b\n", "good.to_out.0-x.weight"]
    save_file({name: torch.ones(2) for name in names} | {"nan": torch.tensor([0.0, float("nan")])}, tmp_path / "a.safetensors")
    problems = Problems("bad")
    found = read_tensors(open_safetensors(tmp_path / "a.safetensors"), problems)
    assert "good.to_out.0-x.weight" in found and len(found) == 2
    assert len(problems.messages) == 6 and any("'../../etc/cron'" in message for message in problems.messages)
    assert any("nan has NaN or infinite values" in message for message in problems.messages)


def test_half_precision_is_read_as_fp32(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.bfloat16), "i": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    found = read_tensors(open_safetensors(tmp_path / "a.safetensors"), Problems("bad"))
    assert found["a"].dtype == torch.float32 and found["i"].dtype == torch.int64


@pytest.mark.parametrize(
    ("A", "B", "wrong"),
    [
        ((4, 8), (6, 4), False), ((4, 8, 3, 3), (6, 4, 1, 1), False), ((4, 8), (6, 3), True), ((4, 8, 3, 3), (6, 4), True),
        ((4, 8, 3, 3), (6, 4, 3, 3), True), ((0, 8), (6, 0), True), ((4,), (6,), True),
    ],
)  # fmt: skip
def test_factors_that_are_no_pair(A: tuple[int, ...], B: tuple[int, ...], wrong: bool) -> None:
    assert bool(factor_problem("x", torch.ones(A), torch.ones(B))) is wrong


def test_names_of_many_characters_are_refused(tmp_path: Path) -> None:
    save_file({"a" * 301: torch.ones(1), "b" * 300: torch.ones(1)}, tmp_path / "x.safetensors")
    problems = Problems("Bad", DataError)
    assert list(read_tensors(open_safetensors(tmp_path / "x.safetensors"), problems)) == ["b" * 300]
    assert len(problems.messages) == 1 and "name is 301 characters long ('aaaa" in problems.messages[0]

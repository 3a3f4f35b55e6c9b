"""Tensors put aside come back bit for bit, from memory and from a file that leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorakeet.errors import EnvironmentProblem
from lorakeet.memory.spill import HostSpill, Spill


@pytest.mark.parametrize("on_disk", [False, True])
def test_all_comes_back_in_any_order(tmp_path: Path, on_disk: bool) -> None:
    spill = Spill(tmp_path if on_disk else None)
    for _ in range(2):
        kept = {(block, batch): torch.randn(1, 3 + batch, 4).bfloat16() for block in range(3) for batch in range(2)}
        for key, tensor in kept.items():
            spill.put(key, tensor)
        for key in reversed(list(kept)):
            assert torch.equal(spill.take(key), kept[key])
        with pytest.raises(KeyError):
            spill.take((0, 0))
    spill.put("strided", torch.arange(6.0).view(2, 3).t())
    assert torch.equal(spill.take("strided"), torch.arange(6.0).view(2, 3).t())
    assert spill._end == 0 and list(tmp_path.iterdir()) == []
    spill.close()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    spill = Spill(tmp_path)
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        spill.put("a", torch.zeros(3))
    spill.close()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"scratch file .* cannot be written: No such file.*memory\.store"):
        Spill(tmp_path / "gone")
    with pytest.raises(EnvironmentProblem, match=r"No such file or directory\. Choose another --out\.$"):
        Spill(tmp_path / "gone", "Choose another --out.")


def test_the_host_keeps_a_copy_and_gives_it_back_on_its_device() -> None:
    spill, states = HostSpill(), torch.randn(3, 5).bfloat16().t()
    kept = states.clone()
    spill.put((0, 1), states)
    states.zero_()
    assert torch.equal(spill.get((0, 1)), kept) and (0, 1) in spill
    found = spill.take((0, 1))
    assert torch.equal(found, kept) and found.device == states.device
    assert (0, 1) not in spill and spill._devices == {}

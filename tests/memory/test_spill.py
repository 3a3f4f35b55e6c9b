"""Tensors put aside come back bit for bit, from memory and from a file that leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorakeet.errors import EnvironmentProblem
from lorakeet.memory.spill import Aside, HostAside


@pytest.mark.parametrize("on_disk", [False, True])
def test_all_comes_back_in_any_order(tmp_path: Path, on_disk: bool) -> None:
    aside = Aside(tmp_path if on_disk else None)
    for _ in range(2):
        kept = {(block, batch): torch.randn(1, 3 + batch, 4).bfloat16() for block in range(3) for batch in range(2)}
        for key, tensor in kept.items():
            aside.put(key, tensor)
        for key in reversed(list(kept)):
            assert torch.equal(aside.take(key), kept[key])
        with pytest.raises(KeyError):
            aside.take((0, 0))
    aside.put("strided", torch.arange(6.0).view(2, 3).t())
    assert torch.equal(aside.take("strided"), torch.arange(6.0).view(2, 3).t())
    assert aside._end == 0 and list(tmp_path.iterdir()) == []
    aside.close()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    aside = Aside(tmp_path)
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        aside.put("a", torch.zeros(3))
    aside.close()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"scratch file .* cannot be written: No such file.*memory\.store"):
        Aside(tmp_path / "gone")
    with pytest.raises(EnvironmentProblem, match=r"No such file or directory\. Choose another --out\.$"):
        Aside(tmp_path / "gone", "Choose another --out.")


def test_the_host_keeps_a_copy_and_gives_it_back_on_its_device() -> None:
    aside, states = HostAside(), torch.randn(3, 5).bfloat16().t()
    kept = states.clone()
    aside.put((0, 1), states)
    states.zero_()
    assert torch.equal(aside.look((0, 1)), kept) and (0, 1) in aside
    found = aside.take((0, 1))
    assert torch.equal(found, kept) and found.device == states.device
    assert (0, 1) not in aside and aside._devices == {}

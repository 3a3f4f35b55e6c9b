"""Tensors put aside come back bit for bit, from memory and from a file that leaves nothing behind."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.errors import EnvironmentProblem
from lorakeet.memory.spill import LEAVING, HostSpill, Spill
from lorakeet.memory.transfer import CudaTransfer
from tiny.cards import Device, Event, Stream, by_chance, computing_first, copying_first, pinned


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


CPU, BLOCKS = torch.device("cpu"), 7


def wrong(device: Device, buffers: int = LEAVING + 1) -> int:
    """How many of some states come back with other numbers, where a few places of memory take turns in holding them."""
    spill, seen = HostSpill(transfer_on(device)), list[tuple[int, torch.Tensor]]()
    places = [torch.zeros(4) for _ in range(buffers)]
    for number in range(BLOCKS):
        state = places[number % buffers]
        device.computing.ask("do", lambda state=state, number=number: state.fill_(number))
        spill.put(number, state)
    for number in reversed(range(BLOCKS)):
        found = spill.take(number, number - 1 if number else None)
        device.computing.ask("do", lambda number=number, found=found: seen.append((number, found.clone())))
    device.finish()
    assert [number for number, _ in seen] == list(reversed(range(BLOCKS)))
    assert not spill._tensors and not spill._leaving and not spill._arriving
    return sum(not torch.equal(found, torch.full((4,), float(number))) for number, found in seen)


def transfer_on(device: Device) -> CudaTransfer:
    none: Any = None
    return CudaTransfer(none, CPU, cuda=device, pinned=pinned)


@pytest.fixture
def host_waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host waited for."""
    found: list[str] = []
    for kind in (Event, Stream):
        monkeypatch.setattr(kind, "synchronize", lambda *_, kind=kind: found.append(kind.__name__))
    return found


def test_every_order_that_the_events_allow_gives_the_right_numbers(host_waits: list[str]) -> None:
    for choose in (computing_first, copying_first, *map(by_chance, range(8))):
        assert wrong(Device(choose)) == 0
    assert host_waits == []


@pytest.mark.parametrize(("deaf", "choose"), [("computing", computing_first), ("copying", copying_first)])
def test_without_one_of_the_waits_the_numbers_are_wrong(deaf: str, choose: Any) -> None:
    assert wrong(Device(choose, deaf=(deaf,))) > 0


def test_so_many_are_held_while_they_leave_and_no_more() -> None:
    assert wrong(Device(computing_first), buffers=LEAVING) > 0, "memory that is still being copied is not free"
    spill = HostSpill(transfer_on(Device(computing_first)))
    held = [torch.zeros(3) for _ in range(5)]
    seen = [weakref.ref(tensor) for tensor in held]
    for number in range(5):
        spill.put(number, held.pop(0))
        spill._transfer._cuda.finish()
        assert sum(one() is not None for one in seen) - len(held) <= LEAVING
    spill.take(4)
    assert [one() for one in seen] == [None] * 5, "none while blocks go back"


def test_what_is_dropped_or_read_twice_is_no_other() -> None:
    device = Device(computing_first)
    spill = HostSpill(transfer_on(device))
    spill.put("a", torch.ones(2))
    first, second = spill.get("a"), spill.get("a")
    device.finish()
    assert torch.equal(first, second) and first is not second and "a" in spill
    spill.put("b", torch.zeros(2))
    spill.take("b", "a")
    spill.clear()
    spill.put("a", torch.full((2,), 5.0))
    found = spill.take("a")
    device.finish()
    assert torch.equal(found, torch.full((2,), 5.0)), "not what was on its way before"


@pytest.mark.parametrize("leave", [lambda spill: spill.drop("a"), HostSpill.clear], ids=["drop", "clear"])
def test_memory_that_something_arrives_in_is_computed_with_only_after_its_copy(leave: Callable[[HostSpill], None]) -> None:
    device = Device(computing_first)
    spill = HostSpill(transfer_on(device))
    for key in "ab":
        spill.put(key, torch.ones(2))
    spill.take("b", "a")
    arriving = spill._arriving["a"][0]
    leave(spill)
    device.computing.ask("do", lambda: arriving.fill_(7.0))  # another tensor in the same memory
    device.finish()
    assert torch.equal(arriving, torch.full((2,), 7.0))

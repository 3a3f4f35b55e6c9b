"""Records on their way to a CUDA device: right in every order that a device may choose, wrong without the waits."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.memory.store import WeightStore, new_store
from lorakeet.memory.stream import RecordStream
from lorakeet.memory.transfer import STAGINGS, CudaTransfer
from tiny.cards import Device, Event, by_chance, computing_first, copying_first, pinned

RECORDS = 5
TURN = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
CPU = torch.device("cpu")


def stored(folder: Path) -> WeightStore:
    if not (folder / "s").exists():
        with new_store(folder / "s", identity={}, tensors=RECORDS) as writer:
            for number in range(RECORDS):
                writer.add(f"b.{number}", {"w": torch.full((10 + number,), float(number))})
    return WeightStore(folder / "s")


def wrong(device: Device, folder: Path, *, slots: int = 2, keep: bool = False, turns: int = 3, **host: Any) -> int:
    """How many of the records that a few passes forth and back compute with hold other numbers than their own."""
    store = stored(folder)
    transfer = CudaTransfer(store, CPU, keep=keep, cuda=device, **{"pinned": pinned, **host})
    stream = RecordStream(store, [f"b.{number}" for number in range(RECORDS)], slots=slots, transfer=transfer)
    seen: list[tuple[int, torch.Tensor]] = []
    order = TURN * turns
    for place, index in enumerate(order):
        views = stream.fetch(index, order[min(place + 1, len(order) - 1)])
        device.computing.ask("do", lambda index=index, view=views["w"]: seen.append((index, view.clone())))
    stream.release()
    stream.close()
    device.finish()
    assert [index for index, _ in seen] == order
    return sum(not torch.equal(found, torch.full((10 + index,), float(index))) for index, found in seen)


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize("keep", [False, True])
def test_every_order_that_the_events_allow_gives_the_right_numbers(slots: int, keep: bool, tmp_path: Path) -> None:
    for choose in (computing_first, copying_first, *map(by_chance, range(5))):
        assert wrong(Device(choose), tmp_path, slots=slots, keep=keep) == 0


@pytest.mark.parametrize(
    ("deaf", "choose"),
    [("computing", computing_first), ("copying", copying_first)],
    ids=["computed with before it is there", "overwritten before it is computed with"],
)
@pytest.mark.parametrize("keep", [False, True])
def test_without_one_of_the_waits_the_numbers_are_wrong(deaf: str, choose: Any, keep: bool, tmp_path: Path) -> None:
    assert wrong(Device(choose, deaf=(deaf,)), tmp_path, keep=keep) > 0


def test_a_pinned_buffer_is_not_read_into_before_its_copy_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(Device(copying_first), tmp_path) == 0
    monkeypatch.setattr(Event, "synchronize", lambda _: None)
    assert wrong(Device(computing_first), tmp_path) > 0


@pytest.mark.parametrize(("keep", "most"), [(False, STAGINGS), (True, RECORDS)])
def test_so_much_is_pinned(keep: bool, most: int, tmp_path: Path) -> None:
    store, device = stored(tmp_path), Device(by_chance(1))
    taken: list[int] = []

    def pin(size: int) -> torch.Tensor:
        taken.append(size)
        return pinned(size)

    stream = RecordStream(store, [f"b.{number}" for number in range(RECORDS)], transfer=CudaTransfer(
        store, CPU, keep=keep, cuda=device, pinned=pin
    ))  # fmt: skip
    for index in TURN * 2:
        stream.fetch(index, index)
    stream.close()
    assert len(taken) == most


def powers(size: int) -> int:
    """What torch pins for so many bytes."""
    return 1 << (size - 1).bit_length()


class Host:
    """The host's memory: `free` bytes in all for those that pin it, of which the system pins `most`."""

    def __init__(self, free: int, most: int) -> None:
        self.free, self.most = free, most
        self.all: list[weakref.ref[torch.Tensor]] = []

    def pinned(self) -> int:
        return sum(powers(one.nbytes) for each in self.all if (one := each()) is not None)

    def left(self) -> int:
        return self.free - self.pinned()

    def pin(self, size: int) -> torch.Tensor:
        if self.pinned() + powers(size) > self.most:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        found = pinned(size)
        self.all.append(weakref.ref(found))
        return found


def test_two_that_keep_records_leave_a_quarter_of_the_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each saw all of it free, and what it needs is less than three quarters."""
    store, host = stored(tmp_path), Host(free=500, most=1 << 20)
    names = [f"b.{number}" for number in range(RECORDS)]
    streams = []
    for _ in range(2):
        transfer = CudaTransfer(store, CPU, keep=True, cuda=Device(by_chance(1)), pinned=host.pin, free=host.left)
        streams.append((RecordStream(store, names, transfer=transfer), transfer))
    for index in TURN * 2:
        for stream, _ in streams:
            stream.fetch(index, index)
    kept = [len(transfer._kept) for _, transfer in streams]
    assert min(kept) > 0 and 64 * sum(kept) <= 0.75 * 500 < 2 * 64 * RECORDS
    said = [message for message in caplog.messages if "come from disk" in message]
    assert len(said) == sum(count < RECORDS for count in kept)
    for stream, transfer in streams:
        transfer.close()
        stream.release()


@pytest.mark.parametrize(("free", "most"), [(400, 1 << 20), (1 << 20, 200), (1 << 20, 130), (1 << 20, 60), (1 << 20, 0)])
def test_where_no_more_can_be_pinned_the_rest_comes_from_disk(
    free: int, most: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for choose in (computing_first, copying_first, by_chance(1)):
        caplog.clear()
        host = Host(free, most)
        assert wrong(Device(choose), tmp_path, keep=True, pinned=host.pin, free=host.left) == 0
        said = [message for message in caplog.messages if "come from disk" in message]
        assert len(said) == 1 and "\n" not in said[0]
        assert ("the system pins no more of the host's memory (CUDA error: out of memory)" in said[0]) == (free > 400)
        assert len(caplog.messages) == 1 + (most < 100), "buffers are said once too, where none can be pinned"


def test_what_is_closed_gives_torchs_own_pinned_memory_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    transfer = CudaTransfer(stored(tmp_path), CPU, keep=True, cuda=Device(computing_first), pinned=pinned)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: emptied.append(len(transfer._kept)))
    transfer._kept[0] = pinned(4)
    transfer.close()
    assert emptied == [0], "once nothing of it is in use"

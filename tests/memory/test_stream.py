"""Buffers in turn: every record is right whatever the order, no more are held than were asked for, and what is there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorakeet.errors import DataError
from lorakeet.memory.store import WeightStore, new_store
from lorakeet.memory.stream import RecordStream, StreamedRows
from lorakeet.memory.transfer import CudaTransfer
from tiny.cards import Device, by_chance, computing_first, copying_first, pinned


def stream(folder: Path, count: int = 5, slots: int = 2) -> RecordStream:
    with new_store(folder / "s", identity={}, tensors=count) as writer:
        for number in range(count):
            writer.add(f"b.{number}", {"w": torch.full((10 + number,), float(number))})
    return RecordStream(WeightStore(folder / "s"), [f"b.{number}" for number in range(count)], slots=slots)


def test_there_and_back_reads_twice_what_was_not_still_there_at_the_turn(tmp_path: Path) -> None:
    found = stream(tmp_path)
    order = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    for place, index in enumerate(order):
        then = order[min(place + 1, len(order) - 1)]
        views = found.fetch(index, then)
        assert torch.equal(views["w"], torch.full((10 + index,), float(index)))
    assert found.bytes_read == sum(record.bytes for record in found.records) * 2 - sum(
        record.bytes for record in found.records[3:]
    )
    found.close()


def test_any_order_gives_the_right_record_while_another_is_read(tmp_path: Path) -> None:
    found = stream(tmp_path)
    chance = torch.Generator().manual_seed(0)
    for _ in range(50):
        index, then = torch.randint(5, (2,), generator=chance).tolist()
        views = found.fetch(index, then)
        assert bool((views["w"] == index).all()) and len(views["w"]) == 10 + index
    assert len(found._slots) <= 2 and found.slot_bytes == found.records[4].bytes
    found.close()


def test_what_the_reader_meets_is_raised_where_the_record_is_wanted(tmp_path: Path) -> None:
    found = stream(tmp_path)
    os.truncate(tmp_path / "s", found.records[3].begin + 4)
    found.fetch(2, 3)
    with pytest.raises(DataError, match="cut off"):
        found.fetch(3, 4)


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_forth_and_back_again_reads_only_what_has_no_place(slots: int, tmp_path: Path) -> None:
    found = stream(tmp_path, slots=slots)
    turn = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    for _ in range(3):
        for place, index in enumerate(turn):
            assert bool((found.fetch(index, turn[min(place + 1, 9)])["w"] == index).all())
    out, back = found.records[slots:], found.records[: 5 - slots]  # read on the way out, and on the way back
    first = sum(record.bytes for record in found.records[:slots])
    assert found.bytes_read == first + 3 * sum(record.bytes for record in (*out, *back))
    assert len(found._slots) == slots == len(found.fill())
    found.close()


def matrix(folder: Path, device: Device | None = None) -> tuple[StreamedRows, torch.Tensor]:
    """A matrix of 11 rows beside blocks that are longer than its tiles, for the CPU or a simulated device, and its numbers."""
    numbers = torch.arange(33.0).view(11, 3)
    with new_store(folder / "s", identity={}, tensors=3) as writer:
        writer.add("b.0", {"w": torch.full((40,), -1.0)})
        writer.add("b.1", {"w": torch.full((40,), -2.0)})
        writer.add("head", {"weight": numbers})
    store = WeightStore(folder / "s")
    transfer = None if device is None else CudaTransfer(store, torch.device("cpu"), cuda=device, pinned=pinned)
    blocks = RecordStream(store, ["b.0", "b.1"], transfer=transfer)
    return StreamedRows("head.weight", torch.device("cpu"), blocks), numbers


def test_tiles_of_a_matrix_come_end_to_end(tmp_path: Path) -> None:
    rows, numbers = matrix(tmp_path)
    for size in (1, 4, 11, 50):
        found = [(part, tile.clone()) for part, tile in rows.in_tiles(size)]
        assert torch.equal(torch.cat([tile for _, tile in found]), numbers)
        assert all(torch.equal(tile, numbers[part]) and len(tile) <= size for part, tile in found)
    assert torch.equal(rows[2:5], numbers[2:5]), "as any rows of a store"
    for _, tile in rows.in_tiles(4):
        assert len(tile) == 4
        break  # what is on its way is waited for


def passes(folder: Path, device: Device, turns: int = 3) -> bool:
    """Whether blocks and tiles of the matrix, which take turns on a simulated device, are computed with as they are."""
    rows, numbers = matrix(folder, device)
    seen: list[torch.Tensor] = []

    def compute(given: torch.Tensor) -> None:
        device.computing.ask("do", lambda: seen.append(given.clone()))

    for turn in range(turns):
        compute(rows._beside.fetch(turn % 2, (turn + 1) % 2)["w"])
        for _, tile in rows.in_tiles(4):
            compute(tile)
    rows._beside.release()
    device.finish()
    rows._beside.close()
    blocks, tiles = seen[::4], [torch.cat(seen[4 * turn + 1 : 4 * turn + 4]) for turn in range(turns)]
    return all(bool((block == -1 - turn % 2).all()) and torch.equal(tiles[turn], numbers) for turn, block in enumerate(blocks))


def test_tiles_come_to_a_device_beside_blocks_in_every_order_that_the_events_allow(tmp_path: Path) -> None:
    """Through the same stream and thread, and pinned buffers of their own size."""
    for number, choose in enumerate((computing_first, copying_first, *map(by_chance, range(6)))):
        (folder := tmp_path / str(number)).mkdir()
        assert passes(folder, Device(choose))
    for deaf, choose in (("computing", computing_first), ("copying", copying_first)):
        (folder := tmp_path / deaf).mkdir()
        assert not passes(folder, Device(choose, deaf=(deaf,)))

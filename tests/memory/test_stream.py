"""Buffers in turn: every record is right whatever the order, no more are held than were asked for, and what is there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorakeet.errors import DataError
from lorakeet.memory.store import WeightStore, new_store
from lorakeet.memory.stream import RecordStream


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


def test_with_one_slot_nothing_is_read_ahead(tmp_path: Path) -> None:
    found = stream(tmp_path, slots=1)
    for index in (0, 1, 2, 2, 4, 3, 0):
        views = found.fetch(index, (index + 1) % 5)
        assert bool((views["w"] == index).all()) and len(found._slots) == 1
    assert found.bytes_read == sum(found.records[index].bytes for index in (0, 1, 2, 4, 3, 0))
    found.close()


def test_what_the_reader_meets_is_raised_where_the_record_is_wanted(tmp_path: Path) -> None:
    found = stream(tmp_path)
    os.truncate(tmp_path / "s", found.records[3].begin + 4)
    found.fetch(2, 3)
    with pytest.raises(DataError, match="cut off"):
        found.fetch(3, 4)


def test_with_a_slot_for_each_record_all_are_read_once(tmp_path: Path) -> None:
    two = stream(tmp_path)
    found = RecordStream(two.store, [f"b.{number}" for number in range(5)], slots=5)
    for index in (0, 1, 2, 3, 4, 3, 2, 1, 0, 1):
        assert bool((found.fetch(index, (index + 1) % 5)["w"] == index).all())
    assert found.bytes_read == sum(record.bytes for record in found.records)
    two.close()


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


def test_released_buffers_are_gone_and_come_again(tmp_path: Path) -> None:
    found = stream(tmp_path)
    found.fetch(1, 2)
    found.release()
    assert found._slots == []
    assert bool((found.fetch(3, 4)["w"] == 3).all()) and len(found._slots) == 2
    found.close()

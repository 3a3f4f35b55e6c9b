"""A store and a scratch file of shapes alone: laid out as the real ones, and what is read takes its place in a ledger."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakeet.memory.ledger import Ledger
from lorakeet.memory.shape_only import ShapeSpill, ShapeStore
from lorakeet.memory.spill import LEAVING
from lorakeet.memory.store import WeightStore, new_store

RECORDS = {
    "b.0": {"w": torch.zeros(10, 3), "codes": torch.zeros(7, dtype=torch.uint8)},
    "b.1": {"w": torch.zeros(2, 3)},
    "embed": {"weight": torch.zeros(50, 4, dtype=torch.bfloat16)},
}


def test_its_records_are_as_long_as_those_of_a_file(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", identity={}, tensors=4) as writer:
        for name, tensors in RECORDS.items():
            writer.add(name, tensors)
    real, outlined = WeightStore(tmp_path / "s"), ShapeStore(RECORDS, {"packed": "{}"})
    for name, tensors in RECORDS.items():
        assert outlined.record(name).bytes == real.record(name).bytes
        assert set(outlined.record(name).tensors) == set(tensors)
    assert outlined.identity == {"packed": "{}"}
    real.close()
    outlined.close()


def test_rows_that_are_looked_up_are_held_with_those_that_were_read() -> None:
    with Ledger() as ledger:
        rows = ShapeStore(RECORDS, {}).rows("embed.weight")
        ids = torch.zeros(2, 6, dtype=torch.long)
        before = ledger.bytes
        with ledger.phase("look up"):
            found = rows.lookup(ids)
        assert found.shape == (2, 6, 4) and found.dtype == torch.bfloat16
        assert ledger.bytes - before == found.nbytes
        assert ledger.peaks["look up"].bytes - before >= 2 * found.nbytes
        assert rows.lookup(torch.zeros(9, 9, dtype=torch.long)).shape == (9, 9, 4), "no more rows are read than there are"


def test_what_is_spilled_is_in_memory_again_when_it_is_taken() -> None:
    with Ledger() as ledger:
        spill, states = ShapeSpill(), torch.empty(5, 8)
        whole = ledger.bytes
        spill.put("a", states)
        del states
        assert "a" in spill and ledger.bytes == whole - 160
        assert spill.get("a").shape == (5, 8) and spill.take("a").dtype == torch.float32
        assert "a" not in spill


def test_what_a_device_holds_for_its_copies_is_held_in_a_rehearsal_too() -> None:
    """The last ones put, until the first is taken; and the one that is taken next."""
    with Ledger() as ledger:
        spill, before = ShapeSpill(copied=True), ledger.bytes
        for number in range(5):
            spill.put(number, torch.empty(5, 8))
            assert ledger.bytes - before == 160 * min(number + 1, LEAVING)
        found = spill.take(4, 3)
        assert ledger.bytes - before == 320
        del found
        found = spill.take(3, None)
        assert ledger.bytes - before == 160 and found.shape == (5, 8)
        del found
        assert ledger.bytes == before

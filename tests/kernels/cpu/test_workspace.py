"""Where what blocks keep lies, and when its memory is held."""

from __future__ import annotations

import pytest

from lorakeet.kernels.cpu.workspace import Workspaces
from lorakeet.memory.measure import resident_bytes
from tiny.native import needs_native
from tiny.settled import settled_bytes

pytestmark = needs_native
MIB = 1 << 20


def test_workspaces_are_adjacent_and_freed_with_their_tensors() -> None:
    rooms = Workspaces(1 << 30)
    one, two, three = rooms.take(100), rooms.take(64), rooms.take(1)
    starts = [each.data_ptr() - one.data_ptr() for each in (one, two, three)]
    assert starts == [0, 128, 192] and one.data_ptr() % 64 == 0 and len(one) == 100
    one.fill_(7), two.fill_(8)
    assert int(one.min()) == int(one.max()) == 7, "no room lies in another"
    del three, two
    assert rooms.taken == 1 and rooms.take(5).data_ptr() == one.data_ptr() + 128
    first = one.data_ptr()
    del one
    assert rooms.taken == 0 and rooms.take(5).data_ptr() == first


def test_pages_come_when_they_are_written_to_and_go_when_they_are_released() -> None:
    rooms = Workspaces(1 << 36)
    before = settled_bytes()
    held = rooms.take(8 * MIB)
    held.fill_(1)
    passing = rooms.take(64 * MIB)
    passing.fill_(1)
    assert resident_bytes() - before > 70 * MIB
    del passing
    assert resident_bytes() - before > 70 * MIB, "kept for the next pass"
    rooms.release()
    assert resident_bytes() - before < 20 * MIB
    assert int(held.min()) == 1
    assert int(rooms.take(64 * MIB).max()) == 0, "and are there again"


def test_a_gap_is_filled_before_anything_is_put_behind() -> None:
    """As where a pass that nobody differentiates goes after the next one has begun, again and again."""
    rooms = Workspaces(1 << 30)
    held = rooms.take(4096)
    base, last = held.data_ptr(), 0
    for _ in range(50):
        new = rooms.take(4096)
        last, held = new.data_ptr() - base, new
    assert last <= 4096 and rooms.taken == 1


def test_where_nothing_freed_is_to_stay_pages_go_with_their_piece() -> None:
    rooms = Workspaces(1 << 36)
    rooms.keeps = False
    before = settled_bytes()
    held, other = rooms.take(64 * MIB), rooms.take(MIB)
    held.fill_(1), other.fill_(2)
    del held
    assert resident_bytes() - before < 20 * MIB and int(other.min()) == 2


@pytest.mark.parametrize("space", [0, 1000])
def test_what_does_not_fit_is_on_the_heap(space: int) -> None:
    rooms = Workspaces(space)
    held = rooms.take(5000)
    assert len(held) >= 5000 and rooms.taken == 0
    held.fill_(3)
    rooms.release()
    assert int(held.min()) == 3


def test_where_address_space_is_limited_the_heap_serves() -> None:
    rooms = Workspaces(1 << 62)
    assert len(rooms.take(10)) >= 10 and rooms.taken == 0 and rooms.space == 0

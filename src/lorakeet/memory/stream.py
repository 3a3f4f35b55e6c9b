"""Records of a store that come into buffers in turn: while one is computed with, a thread reads the next into another."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakeet.memory.store import StoreRecord, WeightStore
from lorakeet.memory.transfer import HostTransfer, Transfer


@dataclass(eq=False)
class _Buffer:
    """A buffer, the mark of its last use, the record in it or on its way, the fetching, and the record's tensors there."""

    buffer: Tensor
    free: Any
    index: int | None = None
    fetching: Future[Any] | None = None
    views: dict[str, Tensor] = field(default_factory=dict)


class RecordStream:
    """The records `names` of `store`, by their number. At most `slots` are in memory, each in a buffer as long as the longest.

    With two slots one is read while the other is computed with; with one, whoever computes waits. With as many slots as records
    each is read once and stays. Between the two, the record
    that was used longest ago makes room, so that of n records in s slots a pass forth and back reads 2·(n − s). Where the buffers
    are and how they are filled is the `transfer`'s to say; left out, they are in the CPU's memory.
    """

    def __init__(self, store: WeightStore, names: Sequence[str], *, slots: int = 2, transfer: Transfer | None = None) -> None:
        self.store, self.slots, self.transfer = store, slots, transfer or HostTransfer(store)
        self.records: list[StoreRecord] = [store.record(name) for name in names]
        self._slots: list[_Buffer] = []
        self._in_use: _Buffer | None = None
        self.bytes_read = 0

    @property
    def slot_bytes(self) -> int:
        """How long each of the buffers is."""
        return max(record.bytes for record in self.records)

    def bring(self, index: int, then: int) -> dict[str, Tensor]:
        """The tensors of record `index`, valid until the next call; `then` is read meanwhile where there is another buffer.

        Raises what reading raised: DataError where the store was cut off.
        """
        if self._in_use is not None:
            self._in_use.free = self.transfer.mark()
        slot = self._holding(index)
        if slot is None:
            slot = self._fill(index, keep=None)
        self._await(slot)
        self._used(slot)
        self._in_use = slot
        if self.slots > 1 and self._holding(then) is None:
            self._fill(then, keep=slot)
        return slot.views

    def fill(self) -> list[Tensor]:
        """Every buffer, made now; what they hold is what `bring` put there."""
        while len(self._slots) < min(self.slots, len(self.records)):
            self._slots.append(self._new_slot())
        return [slot.buffer for slot in self._slots]

    def release(self) -> None:
        """Lets the buffers go, with what is in them; the next `bring` makes new ones. No view of `bring` may be in use."""
        for slot in self._slots:
            self._await(slot)
        self._slots, self._in_use = [], None

    def close(self) -> None:
        """Ends the reading thread and closes the store."""
        self.transfer.close()
        self._slots, self._in_use = [], None
        self.store.close()

    def _new_slot(self) -> _Buffer:
        return _Buffer(self.transfer.buffer(self.slot_bytes), self.transfer.mark())

    def _await(self, slot: _Buffer) -> None:
        """What is computed from now on finds in `slot` what was being fetched into it."""
        if slot.fetching is not None:
            self.transfer.wait_for(slot.fetching)
            slot.fetching = None

    def _used(self, slot: _Buffer) -> None:
        """Puts `slot` last: slots stand in the order of their use."""
        self._slots.remove(slot)
        self._slots.append(slot)

    def _holding(self, index: int) -> _Buffer | None:
        return next((slot for slot in self._slots if slot.index == index), None)

    def _fill(self, index: int, *, keep: _Buffer | None) -> _Buffer:
        """Begins to bring record `index` into a buffer other than `keep`: an empty one, else the one used longest ago."""
        slot = next((slot for slot in self._slots if slot.index is None), None)
        if slot is None and len(self._slots) < self.slots:
            slot = self._new_slot()
            self._slots.append(slot)
        if slot is None:
            slot = next(slot for slot in self._slots if slot is not keep)
        self._await(slot)
        self._used(slot)
        record = self.records[index]
        slot.index, slot.views = index, record.views(slot.buffer)
        slot.fetching = self.transfer.fetch(record, slot.buffer, slot.free)
        self.bytes_read += record.bytes
        return slot

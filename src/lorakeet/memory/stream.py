"""Records of a store that come into buffers in turn: while one is computed with, a thread reads the next into another."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakeet.memory.store import Record, Store


@dataclass(eq=False)
class _Slot:
    """A buffer, the record that it holds or is being filled with, the reading, and the record's tensors in the buffer."""

    buffer: Tensor
    index: int | None = None
    reading: Future[None] | None = None
    views: dict[str, Tensor] = field(default_factory=dict)


class RecordStream:
    """The records `names` of `store`, by their number. At most `slots` are in memory, each in a buffer as long as the longest.

    Two slots are what streaming needs; with as many slots as records each is read once and stays. Between the two, the record
    that was used longest ago makes room, so that of n records in s slots a pass forth and back reads 2·(n − s).
    """

    def __init__(self, store: Store, names: Sequence[str], *, slots: int = 2) -> None:
        self.store, self.slots = store, slots
        self.records: list[Record] = [store.record(name) for name in names]
        self._slots: list[_Slot] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lorakeet-store")
        self.bytes_read = 0

    @property
    def slot_bytes(self) -> int:
        """How long each of the buffers is."""
        return max(record.bytes for record in self.records)

    def bring(self, index: int, then: int) -> dict[str, Tensor]:
        """The tensors of record `index`, valid until the next call; `then` is read meanwhile into another buffer.

        Raises what reading raised: DataError where the store was cut off.
        """
        slot = self._holding(index)
        if slot is None:
            slot = self._fill(index, keep=None)
        if slot.reading is not None:
            slot.reading.result()
            slot.reading = None
        self._used(slot)
        if self._holding(then) is None:
            self._fill(then, keep=slot)
        return slot.views

    def fill(self) -> list[Tensor]:
        """Every buffer, made now; what they hold is what `bring` put there."""
        while len(self._slots) < min(self.slots, len(self.records)):
            self._slots.append(_Slot(torch.empty(self.slot_bytes, dtype=torch.uint8)))
        return [slot.buffer for slot in self._slots]

    def release(self) -> None:
        """Lets the buffers go, with what is in them; the next `bring` makes new ones. No view of `bring` may be in use."""
        for slot in self._slots:
            if slot.reading is not None:
                slot.reading.result()
        self._slots = []

    def close(self) -> None:
        """Ends the reading thread and closes the store."""
        self._reader.shutdown(wait=True)
        self._slots = []
        self.store.close()

    def _used(self, slot: _Slot) -> None:
        """Puts `slot` last: slots stand in the order of their use."""
        self._slots.remove(slot)
        self._slots.append(slot)

    def _holding(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.index == index), None)

    def _fill(self, index: int, *, keep: _Slot | None) -> _Slot:
        """Begins to read record `index` into a buffer other than `keep`: an empty one, else the one used longest ago."""
        slot = next((slot for slot in self._slots if slot.index is None), None)
        if slot is None and len(self._slots) < self.slots:
            slot = _Slot(torch.empty(self.slot_bytes, dtype=torch.uint8))
            self._slots.append(slot)
        if slot is None:
            slot = next(slot for slot in self._slots if slot is not keep)
        if slot.reading is not None:
            slot.reading.result()
        self._used(slot)
        record = self.records[index]
        slot.index, slot.views = index, record.views(slot.buffer)
        slot.reading = self._reader.submit(self.store.read, record.begin, slot.buffer[: record.bytes])
        self.bytes_read += record.bytes
        return slot

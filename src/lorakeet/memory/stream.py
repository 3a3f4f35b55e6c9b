"""Streams records of a store, or tiles of a matrix in it, into a few buffers: while one is in use, a thread reads the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.tiled_product import tiles
from lorakeet.memory.store import StoredRows, StoreRecord, TensorLocation, WeightStore
from lorakeet.memory.transfer import HostTransfer


@dataclass(eq=False)
class _Buffer:
    """A buffer with the mark of its last use, the number of its record, the running fetch, and the record's tensors."""

    buffer: Tensor
    free: Any
    index: int | None = None
    fetching: Future[Any] | None = None
    views: dict[str, Tensor] = field(default_factory=dict)


class RecordStream:
    """The records `names` of `store`, or given ones, by number. At most `slots` are in memory, in buffers as long as the longest.

    With two slots one is read while the other is in use; with one, the caller waits. With as many slots as records, each is read
    once and stays. Otherwise the least recently used is replaced, so that a forward and backward pass over n records in s slots
    reads 2·(n − s). `transfer` allocates and fills the buffers; by default in CPU memory. `again`: whether others will read
    the same records.
    """

    def __init__(
        self,
        store: WeightStore,
        names: Sequence[str | StoreRecord],
        *,
        slots: int = 2,
        transfer: HostTransfer | None = None,
        again: bool = False,
    ) -> None:
        self.store, self.slots, self.transfer = store, slots, transfer or HostTransfer(store)
        self.records: list[StoreRecord] = [store.record(name) if isinstance(name, str) else name for name in names]
        self._again = again or slots < len(self.records)
        self._slots: list[_Buffer] = []
        self._in_use: _Buffer | None = None
        self.bytes_read = 0

    @property
    def slot_bytes(self) -> int:
        """The length of each buffer in bytes."""
        return max(record.bytes for record in self.records)

    def fetch(self, index: int, then: int) -> dict[str, Tensor]:
        """Returns the tensors of record `index`, valid until the next call; reads `then` meanwhile if there is another buffer.

        Raises the errors of the reading thread: DataError if the store was cut off.
        """
        if self._in_use is not None:
            self._in_use.free = self.transfer.mark()
        slot = self._slot_of(index)
        if slot is None:
            slot = self._fill(index, keep=None)
        self._await(slot)
        self._used(slot)
        self._in_use = slot
        if self.slots > 1 and self._slot_of(then) is None:
            self._fill(then, keep=slot)
        return slot.views

    def fill(self) -> list[Tensor]:
        """Allocates all buffers and returns them."""
        while len(self._slots) < min(self.slots, len(self.records)):
            self._slots.append(self._new_slot())
        return [slot.buffer for slot in self._slots]

    def release(self) -> None:
        """Frees the buffers; the next `fetch` allocates new ones. No view of `fetch` may be in use."""
        for slot in self._slots:
            self._await(slot)
        self._slots, self._in_use = [], None

    def close(self) -> None:
        """Stops the reading thread and closes the store."""
        self.transfer.close()
        self._slots, self._in_use = [], None
        self.store.close()

    def _new_slot(self) -> _Buffer:
        return _Buffer(self.transfer.buffer(self.slot_bytes), self.transfer.mark())

    def _await(self, slot: _Buffer) -> None:
        """Waits until the fetch into `slot` is complete for later computation."""
        if slot.fetching is not None:
            self.transfer.wait_for(slot.fetching)
            slot.fetching = None

    def _used(self, slot: _Buffer) -> None:
        """Moves `slot` to the end: slots are in the order of their last use."""
        self._slots.remove(slot)
        self._slots.append(slot)

    def _slot_of(self, index: int) -> _Buffer | None:
        return next((slot for slot in self._slots if slot.index == index), None)

    def _fill(self, index: int, *, keep: _Buffer | None) -> _Buffer:
        """Starts to fetch record `index` into a buffer other than `keep`: an empty one, else the least recently used."""
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
        slot.fetching = self.transfer.fetch(record, slot.buffer, slot.free, again=self._again)
        self.bytes_read += record.bytes
        return slot


class StreamedRows(StoredRows):
    """A matrix (rows, columns) in the store of `beside`, which can be passed through once in tiles that are read ahead."""

    def __init__(self, name: str, device: torch.device, beside: RecordStream) -> None:
        super().__init__(beside.store, name, device)
        self._beside = beside

    def in_tiles(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of at most `size` rows, end to end, each with its rows, valid until the next one is yielded.

        Two of them are on the device at a time, and none once this has ended.
        """
        parts = list(tiles(self.shape[0], size))
        records = [self._record(part) for part in parts]
        stream = RecordStream(self._beside.store, records, transfer=self._beside.transfer, again=True)
        try:
            for number, part in enumerate(parts):
                yield part, stream.fetch(number, min(number + 1, len(parts) - 1))["rows"]
        finally:
            stream.release()

    def _record(self, part: slice) -> StoreRecord:
        begin, end = (self._location.begin + row * self._row for row in (part.start, part.stop))
        shape = part.stop - part.start, *self.shape[1:]
        return StoreRecord(begin, end, {"rows": TensorLocation(self.dtype, shape, begin, end)})

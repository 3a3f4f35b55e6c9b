"""How a record gets from the store into the buffer that is computed with: read into it, or read and copied to a CUDA device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakeet.memory.store import StoreRecord, WeightStore

STAGINGS = 2  # pinned buffers: one is read into while the other is copied from


class Transfer(Protocol):
    """Where a RecordStream's buffers are, and how they are filled while something else is computed.

    A device computes after it was asked to: a `mark` stands for all that it was asked to compute so far.
    """

    def buffer(self, size: int) -> Tensor:
        """A new buffer of `size` bytes where the records are computed with."""
        ...

    def mark(self) -> Any:
        """A mark of all that is asked for until now."""
        ...

    def fetch(self, record: StoreRecord, into: Tensor, free: Any) -> Future[Any]:
        """Begins to fill the beginning of `into` with `record`, once what the mark `free` stands for is computed."""
        ...

    def wait_for(self, fetching: Future[Any]) -> None:
        """What is asked for from now on finds the record there. Raises what reading raised: DataError for a store cut off."""
        ...

    def close(self) -> None:
        """Ends the reading thread."""
        ...


class HostTransfer:
    """Records of `store` read straight into buffers of the CPU's memory, by a thread of its own."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lorakeet-store")

    def buffer(self, size: int) -> Tensor:
        """A new buffer."""
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> None:
        """Nothing: the CPU has computed what it was asked for."""

    def fetch(self, record: StoreRecord, into: Tensor, free: None) -> Future[None]:
        """Begins to read."""
        return self._reader.submit(self._store.read, record.begin, into[: record.bytes])

    def wait_for(self, fetching: Future[None]) -> None:
        """Waits until the record is read."""
        fetching.result()

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(wait=True)


def pinned_bytes(size: int) -> Tensor:
    """Memory of the host that a CUDA device copies from by itself; torch takes the next power of two for it."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class CudaTransfer:
    """Records of `store` brought into buffers on a CUDA device, behind the back of what is computed there.

        reading thread    wait until the copy out of a pinned buffer is over → read into it
        copying stream    wait until the slot's last use is computed → copy → event
        computing stream  wait for that event → compute → mark

    The caller waits for the reading alone. With `keep`, every record stays in pinned memory once it was read, and none is read
    again. `cuda` and `pinned` are torch's own unless a test simulates them; no GPU was there to run this on.
    """

    def __init__(
        self,
        store: WeightStore,
        device: torch.device,
        *,
        keep: bool = False,
        cuda: Any = torch.cuda,
        pinned: Callable[[int], Tensor] = pinned_bytes,
    ) -> None:
        self._store, self.device, self.keep, self._cuda, self._pinned = store, device, keep, cuda, pinned
        self._copying = cuda.Stream(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lorakeet-store")
        self._kept: dict[int, Tensor] = {}  # by the record's first byte
        self._staging: deque[tuple[Tensor, Any]] = deque()  # the one used longest ago first, each with the event of its copy

    def buffer(self, size: int) -> Tensor:
        """A new buffer on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def mark(self) -> Any:
        """An event behind everything that the computing stream was given."""
        return self._cuda.current_stream(self.device).record_event()

    def fetch(self, record: StoreRecord, into: Tensor, free: Any) -> Future[Any]:
        """Begins to read and then to copy; the result is the event of the copy."""
        return self._reader.submit(self._bring, record, into, free)

    def wait_for(self, fetching: Future[Any]) -> None:
        """Has the computing stream wait for the copy; this thread waits until it is asked for, no longer."""
        self._cuda.current_stream(self.device).wait_event(fetching.result())

    def close(self) -> None:
        """Ends the reading thread, waits for the last copy, and lets the pinned memory go."""
        self._reader.shutdown(wait=True)
        self._copying.synchronize()
        self._kept.clear()
        self._staging.clear()

    def _bring(self, record: StoreRecord, into: Tensor, free: Any) -> Any:
        source = self._read_kept(record) if self.keep else self._read_staged(record, len(into))
        with self._cuda.stream(self._copying):
            self._copying.wait_event(free)
            into[: record.bytes].copy_(source[: record.bytes], non_blocking=True)
            if into.is_cuda:
                into.record_stream(self._copying)  # so that it is given to nobody while the copy goes on
            over = self._copying.record_event()
        if not self.keep:
            self._staging.append((source, over))
        return over

    def _read_kept(self, record: StoreRecord) -> Tensor:
        kept = self._kept.get(record.begin)
        if kept is None:
            kept = self._pinned(record.bytes)
            self._store.read(record.begin, kept)
            self._kept[record.begin] = kept
        return kept

    def _read_staged(self, record: StoreRecord, size: int) -> Tensor:
        """The record in a pinned buffer of `size` bytes whose last copy is over."""
        if len(self._staging) < STAGINGS:
            source = self._pinned(size)
        else:
            source, over = self._staging.popleft()
            over.synchronize()
        self._store.read(record.begin, source[: record.bytes])
        return source

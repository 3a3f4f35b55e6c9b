"""Transfers records from the store into buffers: read into CPU memory, or read and copied to a CUDA device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import available_memory
from lorakeet.memory.store import StoreRecord, WeightStore

STAGINGS = 2  # pinned buffers: one is read into while the other is copied from
LEFT_FREE = 0.25  # of the host's memory that is free as a transfer begins: others may need it, and pinned memory is not swapped


class HostTransfer:
    """Allocates a RecordStream's buffers and fills them while the device computes: here straight in CPU memory, by a thread."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lorakeet-store")

    def buffer(self, size: int) -> Tensor:
        """Returns a new buffer of `size` bytes on the computing device."""
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> Any:
        """Returns a mark of all work submitted to the device so far; None here: the CPU computes synchronously."""

    def fetch(self, record: StoreRecord, into: Tensor, free: Any, *, again: bool = True) -> Future[Any]:
        """Starts to copy `record` to the start of `into`, once the work before the mark `free` is done.

        `again`: whether it will be fetched again.
        """
        return self._reader.submit(self._store.read, record.begin, into[: record.bytes])

    def wait_for(self, fetching: Future[Any]) -> None:
        """Makes later work wait for the record. Raises the errors of reading: DataError if the store was cut off."""
        fetching.result()

    def close(self) -> None:
        """Stops the reading thread."""
        self._reader.shutdown(wait=True)


def free_host_bytes() -> int:
    """Bytes of the host's memory that are free now (memory/budget)."""
    return available_memory()[0]


def pinned_bytes(size: int) -> Tensor:
    """Returns pinned host memory, which a CUDA device copies asynchronously; torch allocates the next power of two."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class CudaTransfer(HostTransfer):
    """Copies records of `store` into buffers on a CUDA device while it computes.

        reading thread    wait for the copy out of a pinned buffer → read into it
        copying stream    wait for the slot's last use → copy → event
        computing stream  wait for that event → compute → mark

    The caller waits only for reading. With `keep`, a record that is fetched again stays in pinned memory, until that would leave
    less than LEFT_FREE of what was `free` at first, or is refused: later ones come from disk then, and one line says so.

    States that wait in the host's memory (memory/spill) take the same stream, and no one waits for them but the computing stream.
    `cuda`, `pinned` and `free` are the system's own unless a test simulates them. Not run on a GPU.
    """

    def __init__(
        self,
        store: WeightStore,
        device: torch.device,
        *,
        keep: bool = False,
        cuda: Any = torch.cuda,
        pinned: Callable[[int], Tensor] = pinned_bytes,
        free: Callable[[], int] = free_host_bytes,
    ) -> None:
        super().__init__(store)
        self.device, self.keep, self._cuda, self._pinned, self._free = device, keep, cuda, pinned, free
        self._least = int(LEFT_FREE * free()) if keep else 0
        self._full = False  # whether no more records are kept
        self._refused = False  # whether the system has refused to pin a buffer
        self._copying = cuda.Stream(device)
        self._kept: dict[int, Tensor] = {}  # by the record's offset
        self._staging: dict[int, deque[tuple[Tensor, Any]]] = {}  # by size, the oldest first, each with its copy's event

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def mark(self) -> Any:
        """Returns an event after all work on the computing stream."""
        return self._cuda.current_stream(self.device).record_event()

    def fetch(self, record: StoreRecord, into: Tensor, free: Any, *, again: bool = True) -> Future[Any]:
        """Starts to read and then to copy; the future's result is the event of the copy."""
        return self._reader.submit(self._copy, record, into, free, self.keep and again)

    def wait_for(self, fetching: Future[Any]) -> None:
        """Makes the computing stream wait for the copy; this thread waits until the copy is submitted."""
        self._cuda.current_stream(self.device).wait_event(fetching.result())

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Starts to copy `tensor`, once it is computed; the copy, and its event. Until then `tensor` must stay as it is."""
        kept = self._host_buffer(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return kept, self._copied(kept, tensor.detach())

    def to_device(self, kept: Tensor) -> tuple[Tensor, Any]:
        """Starts to copy the pinned `kept` into new memory of the device; the copy, and its event."""
        found = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        return found, self._copied(found, kept)

    def compute_after(self, copied: Any) -> None:
        """Makes later work on the computing stream wait for the event of a copy; no one else waits."""
        self._cuda.current_stream(self.device).wait_event(copied)

    def _copied(self, into: Tensor, source: Tensor) -> Any:
        self._copying.wait_event(self.mark())  # behind all that may still compute with either
        with self._cuda.stream(self._copying):
            into.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def close(self) -> None:
        """Stops the reading thread, waits for the last copy, and gives the pinned memory back to the system."""
        super().close()
        self._copying.synchronize()
        self._kept.clear()
        self._staging.clear()
        _empty_pinned_cache()

    def _copy(self, record: StoreRecord, into: Tensor, free: Any, keep: bool) -> Any:
        kept = self._read_kept(record) if keep else None
        source = self._read_staged(record, len(into)) if kept is None else kept
        with self._cuda.stream(self._copying):
            self._copying.wait_event(free)
            into[: record.bytes].copy_(source[: record.bytes], non_blocking=True)
            if into.is_cuda:
                into.record_stream(self._copying)  # so that it is not reused while the copy runs
            copied = self._copying.record_event()
        if kept is None:
            self._staging[len(into)].append((source, copied))
        return copied

    def _read_kept(self, record: StoreRecord) -> Tensor | None:
        """Returns the record in pinned memory of its own; None where no more is pinned."""
        kept = self._kept.get(record.begin)
        if kept is not None or self._full:
            return kept
        free = self._free()
        if free - (1 << max(0, record.bytes - 1).bit_length()) < self._least:
            self._keep_no_more(f"{bytes_text(free)} of the host's memory are free, and {bytes_text(self._least)} stay so")
            return None
        try:
            kept = self._pinned(record.bytes)
        except RuntimeError as error:
            self._free_some()
            self._keep_no_more(f"the system pins no more of the host's memory ({_first_line(error)})")
            return None
        self._store.read(record.begin, kept)
        self._kept[record.begin] = kept
        return kept

    def _keep_no_more(self, why: str) -> None:
        self._full = True
        logging.getLogger("lorakeet").warning(
            "%d blocks or tiles of the head stay in pinned memory; the others come from disk: %s.", len(self._kept), why
        )

    def _free_some(self) -> None:
        """Frees as many kept records as there are staging buffers, which need pinned memory too."""
        self._copying.synchronize()
        for _ in range(min(STAGINGS, len(self._kept))):
            self._kept.popitem()
        _empty_pinned_cache()

    def _host_buffer(self, size: int) -> Tensor:
        """Returns pinned memory; where the system refuses it, memory of another kind, for which copies make their thread wait."""
        if not self._refused:
            try:
                return self._pinned(size)
            except RuntimeError as error:
                self._refused = True
                logging.getLogger("lorakeet").warning(
                    "The system pins no more of the host's memory (%s). Copies to and from the GPU take longer.",
                    _first_line(error),
                )
        return torch.empty(size, dtype=torch.uint8)

    def _read_staged(self, record: StoreRecord, size: int) -> Tensor:
        """Returns the record in a pinned buffer of `size` bytes whose last copy is complete."""
        waiting = self._staging.setdefault(size, deque())
        if len(waiting) < STAGINGS:
            source = self._host_buffer(size)
        else:
            source, copied = waiting.popleft()
            copied.synchronize()
        self._store.read(record.begin, source[: record.bytes])
        return source


def _empty_pinned_cache() -> None:
    """Gives pinned memory that torch keeps for later back to the system, where this torch can."""
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    if empty is not None and torch.accelerator.is_available():
        empty()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

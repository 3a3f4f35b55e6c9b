"""A thread-safe cache of the least recently used kind, for results that follow from bytes alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """The last `capacity` results by key.

    A key is all that its result depends on, in full and not as a checksum. Results are shared and must not be changed. Exceptions
    are not cached.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._results: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: Key) -> Value | None:
        """The result for `key`, if it is cached."""
        with self._lock:
            found = self._results.get(key)
            if found is not None:
                self._results.move_to_end(key)
            return found

    def put(self, key: Key, value: Value) -> Value:
        """Stores `value` and returns it; drops the least recently used results beyond the capacity."""
        with self._lock:
            self._results[key] = value
            self._results.move_to_end(key)
            while len(self._results) > self.capacity:
                self._results.popitem(last=False)
        return value

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """The cached result, or else that of `make`, which is then stored. Two threads may both make it."""
        found = self.get(key)
        return self.put(key, make()) if found is None else found

    def clear(self) -> None:
        """Drops all results."""
        with self._lock:
            self._results.clear()

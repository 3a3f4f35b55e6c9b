"""The last few results of what is worked out from bytes alone, for files that begin alike: adapters of one recipe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """Results by what they follow from, the `most` that were asked for last. From any thread.

    Keys are all that a result depends on, by their whole content and no checksum of it. Results are shared, so nobody may change
    them. What raises is not kept, and is worked out again with its message each time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._known: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: Key) -> Value | None:
        """What is remembered of `key`."""
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
            return found

    def keep(self, key: Key, value: Value) -> Value:
        """Remembers `value`, and forgets what was asked for longest ago where there are too many."""
        with self._lock:
            self._known[key] = value
            self._known.move_to_end(key)
            while len(self._known) > self.most:
                self._known.popitem(last=False)
        return value

    def of(self, key: Key, work_out: Callable[[], Value]) -> Value:
        """What is remembered of `key`, or else worked out now and remembered. Two threads may both work it out."""
        found = self.get(key)
        return self.keep(key, work_out()) if found is None else found

    def forget(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._known.clear()

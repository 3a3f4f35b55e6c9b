"""Streams and events of the simulated card (tiny/simulated_card): everything is done at once, by the host and in its time."""

from __future__ import annotations

import time
from typing import Any


class Event:
    """An event of the card, where everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds of the host, which computes what the card is given."""
        return 1e3 * (later.at - self.at)

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Stream:
    """A stream of the card, where everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_event(self, event: Event) -> None: ...
    def wait_stream(self, stream: Stream) -> None: ...

    def synchronize(self) -> None: ...

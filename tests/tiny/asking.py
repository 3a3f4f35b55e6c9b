"""An engine with calls that wait for its texts."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakeet.serve.engine import Engine, EngineRequest, Event, Request
from lorakeet.serve.sampling import Sampling


@dataclass
class Answer:
    """What a job told its listener."""

    ids: list[int]
    text: str
    reason: str
    events: list[Event]


class Asking:
    """An engine with calls that wait."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def begin(
        self, ids: tuple[int, ...], adapters: Mapping[str, float] | None = None, *, timeout: float | None = None, **sampling: Any
    ) -> tuple[EngineRequest, queue.SimpleQueue[Event]]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        settings = Sampling(**{"temperature": 0.0, "max_tokens": 12, **sampling})
        return self.engine.submit(Request(ids, settings, adapters or {}, timeout), events.put), events

    def end(self, begun: tuple[EngineRequest, queue.SimpleQueue[Event]]) -> Answer:
        events: list[Event] = []
        while not events or events[-1].reason is None:
            events.append(begun[1].get(timeout=30))
        ids = [event.chosen.token for event in events if event.chosen is not None]
        assert events[-1].reason is not None
        return Answer(ids, "".join(event.text for event in events), events[-1].reason, events)

    def ask(self, ids: tuple[int, ...], adapters: Mapping[str, float] | None = None, **options: Any) -> Answer:
        return self.end(self.begin(ids, adapters, **options))

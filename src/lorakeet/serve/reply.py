"""What an API answers, and what it reads of a request, as plain values: serve/http makes HTTP of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol


class Incoming(Protocol):
    """A request that is being received."""

    @property
    def receive(self) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """The next message of the connection; the last one says that the client is gone."""

    def stream(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they come."""


@dataclass(frozen=True)
class Reply:
    """A text, or pieces of text that are sent as they come."""

    body: str | AsyncIterator[str] = ""
    media: str = "text/plain; charset=utf-8"
    status: int = 200


NOBODY = Reply(status=499)  # the client is gone; nobody reads this


def as_json(data: Any) -> Reply:
    """`data` as JSON."""
    return Reply(json.dumps(data, ensure_ascii=False, separators=(",", ":")), "application/json")

"""Replies and requests of the APIs as plain values, which serve/routes/http translates to HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from lorakeet.errors import LorakeetError

SLOWEST = 1024.0  # bytes a second of a body


class Incoming(Protocol):
    """A request that is being received."""

    @property
    def receive(self) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """The next message of the connection; the last one is the client's disconnect."""

    def stream(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they come."""


@dataclass(frozen=True)
class HttpReply:
    """A text, or pieces of text to send as they come."""

    body: str | AsyncIterator[str] = ""
    media: str = "text/plain; charset=utf-8"
    status: int = 200


class Stalled(LorakeetError):
    """The client stopped sending within a body."""


async def body_pieces(request: Incoming, pause: float, slowest: float = SLOWEST) -> AsyncIterator[bytes]:
    """Yields the body as it comes, so that no client blocks the server.

    Stalled if nothing comes for `pause` seconds, or after these fewer than `slowest` bytes a second since the beginning.
    """
    stream, began, size = request.stream(), time.monotonic(), 0
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), pause)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as error:
            raise Stalled(f"The rest of the request did not come within {pause:g} s; send it again.") from error
        size += len(piece)
        if (passed := time.monotonic() - began) > pause and size < slowest * (passed - pause):
            raise Stalled(f"The request came at less than {slowest:,.0f} bytes a second; send it again, faster.")
        yield piece


CLIENT_GONE = HttpReply(status=499)  # never read


def as_json(data: Any) -> HttpReply:
    """`data` as JSON."""
    return HttpReply(json.dumps(data, ensure_ascii=False, separators=(",", ":")), "application/json")

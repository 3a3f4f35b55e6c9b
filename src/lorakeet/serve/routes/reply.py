"""What an API answers, and what it reads of a request, as plain values: serve/routes/http makes HTTP of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from lorakeet.errors import LorakeetError


class Incoming(Protocol):
    """A request that is being received."""

    @property
    def receive(self) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """The next message of the connection; the last one says that the client is gone."""

    def stream(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they come."""


@dataclass(frozen=True)
class HttpReply:
    """A text, or pieces of text that are sent as they come."""

    body: str | AsyncIterator[str] = ""
    media: str = "text/plain; charset=utf-8"
    status: int = 200


class Stalled(LorakeetError):
    """Nothing more comes of a body that is not whole."""


async def body_pieces(request: Incoming, pause: float) -> AsyncIterator[bytes]:
    """The body as it comes; Stalled where nothing comes for `pause` seconds, so that no client holds the server up for ever."""
    stream = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), pause)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as error:
            raise Stalled(f"Nothing came of the rest of the request for {pause:g} s; send it again.") from error
        yield piece


NOBODY = HttpReply(status=499)  # the client is gone; nobody reads this


def as_json(data: Any) -> HttpReply:
    """`data` as JSON."""
    return HttpReply(json.dumps(data, ensure_ascii=False, separators=(",", ":")), "application/json")

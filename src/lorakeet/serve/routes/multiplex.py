"""Reads several texts of a request as one stream, or whole; stops if the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from lorakeet.serve.engine import Event
from lorakeet.serve.routes.reply import Incoming
from lorakeet.serve.service import GeneratedText, Generation, Service


async def merge_events(texts: Sequence[GeneratedText]) -> AsyncIterator[tuple[int, Event]]:
    """Yields (index, event) of all texts as they come, until all have ended."""
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pump(text: GeneratedText) -> None:
        async for event in text.events():
            await queue.put((text.index, event))

    pumps = [asyncio.create_task(pump(text)) for text in texts]
    try:
        left = len(texts)
        while left:
            index, event = await queue.get()
            left -= event.reason is not None
            yield index, event
    finally:
        for task in pumps:
            task.cancel()


async def collect(request: Incoming, writing: Generation) -> list[list[Event]] | None:
    """All events of each text, or None if the client disconnects."""
    found: list[list[Event]] = [[] for _ in writing.texts]

    async def read() -> None:
        async for index, event in merge_events(writing.texts):
            found[index].append(event)

    reading, leaving = asyncio.create_task(read()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return found if reading.done() else None
    finally:
        for task in (reading, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def collect_and_close(service: Service, request: Incoming, writing: Generation) -> list[list[Event]] | None:
    """As `collect`, and closes the generation in any case."""
    try:
        return await collect(request, writing)
    finally:
        service.close(writing)


async def _gone(request: Incoming) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

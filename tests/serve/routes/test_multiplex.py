"""Several texts as one stream: nothing is lost, the order within a text is kept, and a client that leaves ends it."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from lorakeet.serve.engine import Event
from lorakeet.serve.registry import Lease
from lorakeet.serve.routes.multiplex import collect, merge_events
from lorakeet.serve.service import GeneratedText, Generation


def request(*messages: dict[str, Any]) -> Request:
    waiting = list(messages)

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        await asyncio.Event().wait()

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def tell(text: GeneratedText, *pieces: str, end: bool = True) -> None:
    for piece in pieces:
        text.receive(Event(piece))
    if end:
        text.receive(Event(reason="stop"))


def test_all_texts_come_whole_and_in_order() -> None:
    async def life() -> None:
        texts = (GeneratedText(0), GeneratedText(1))
        tell(texts[0], "a", "b", "c")
        tell(texts[1], "x")
        found = [(index, event.text, event.reason) async for index, event in merge_events(texts)]
        assert [text for index, text, _ in found if index == 0] == ["a", "b", "c", ""]
        assert [text for index, text, _ in found if index == 1] == ["x", ""]
        assert found[-1][2] == "stop"

    asyncio.run(life())


def test_collecting_ends_with_the_client() -> None:
    async def life() -> None:
        whole = GeneratedText(0)
        tell(whole, "a", "b")
        found = await collect(request({"type": "http.request"}), Generation((whole,), Lease(), 1, 0.0))
        assert found is not None and "".join(event.text for event in found[0]) == "ab"
        cut = GeneratedText(0)
        tell(cut, "a", end=False)
        assert await collect(request({"type": "http.disconnect"}), Generation((cut,), Lease(), 1, 0.0)) is None

    asyncio.run(life())

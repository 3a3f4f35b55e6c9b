"""Speakers: a model of this process, and a server with OpenAI's API."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lorakeet.errors import EnvironmentProblem, LorakeetError
from lorakeet.replying.speakers import BASE, ServerSpeaker
from lorakeet.serve.sampling import Sampling
from tiny.hostile_server import answering

ASKED: list[dict[str, Any]] = []
MESSAGES = [{"role": "user", "content": "hi"}]


class Strict(BaseHTTPRequestHandler):
    """Two models; answers chats with server-sent events, as OpenAI's API does."""

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"data": [{"id": "smol"}, {"id": "drugs"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ASKED.append(body)
        if body["messages"][-1]["content"] == "busy":
            return self.answer(429, b"wait a little")
        pieces = [{"role": "assistant"}, {"content": "Hel"}, {"content": "lo"}, {}]
        events = [{"choices": [{"delta": piece}]} for piece in pieces]
        if body["messages"][-1]["content"] == "break":
            events = [*events[:2], {"error": {"message": "out of memory"}}]
        return self.answer(200, b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Strict)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_with_its_models(url: str) -> None:
    speaker, choice = ServerSpeaker.at(f"{url}/v1#drugs")
    assert (speaker.base, speaker.names, choice) == ("smol", ("drugs",), "drugs")
    settings = Sampling(max_tokens=5, temperature=0.2, top_p=0.9, seed=3)
    assert list(speaker.reply(MESSAGES, "drugs", settings)) == ["Hel", "lo"]
    expected = {"messages": MESSAGES, "stream": True, "max_tokens": 5, "temperature": 0.2, "top_p": 0.9, "seed": 3}
    assert ASKED[-1] == {"model": "drugs", **expected}
    assert "".join(speaker.reply(MESSAGES, BASE, settings)) == "Hello" and ASKED[-1]["model"] == "smol"
    assert ServerSpeaker.at(url)[1] == BASE == ServerSpeaker.at(f"{url}#smol")[1]


def test_what_a_server_refuses_is_one_message(url: str) -> None:
    speaker, _ = ServerSpeaker.at(url)
    with pytest.raises(EnvironmentProblem, match=r"refuses \(429 .*\): wait a little"):
        list(speaker.reply([{"role": "user", "content": "busy"}], BASE, Sampling()))
    with pytest.raises(EnvironmentProblem, match=r"ended the reply: .*out of memory"):
        list(speaker.reply([{"role": "user", "content": "break"}], BASE, Sampling()))
    with pytest.raises(LorakeetError, match=r"has no model 'drgs'; it has smol, drugs. Did you mean 'drugs'"):
        ServerSpeaker.at(f"{url}#drgs")
    with pytest.raises(LorakeetError, match="There is no adapter 'x'; there are drugs, base"):
        list(speaker.reply(MESSAGES, "x", Sampling()))
    with pytest.raises(EnvironmentProblem, match="gives no answer"):
        ServerSpeaker.at("http://127.0.0.1:9")


EVENTS = [
    b"null", b"[]", b"3", b'"x"', b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b'{"choices": 3}', b'{"choices": [3]}',
    b'{"choices": [{"delta": 3}]}', b'{"choices": [{"delta": {"content": {"a": 1}}}]}', b'{"error": {}}', b'{"choices": null}',
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_events_of_any_kind_are_texts_or_one_message(event: bytes) -> None:
    with answering([b"data: " + event + b"\n\ndata: [DONE]\n\n"]) as url:
        speaker = ServerSpeaker(url, "smol", ())
        with contextlib.suppress(EnvironmentProblem):
            assert all(isinstance(piece, str) for piece in speaker.reply(MESSAGES, BASE, Sampling()))
    with answering([event]) as url, pytest.raises(EnvironmentProblem):
        ServerSpeaker.at(url)
    with answering([b'{"data": [' + event + b"]}"]) as url, contextlib.suppress(EnvironmentProblem):
        ServerSpeaker.at(url)

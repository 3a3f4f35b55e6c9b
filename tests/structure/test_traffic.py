"""The traffic of benchmarks/serving.py counts what a server wrote, and says why it did not write."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from typing import Any, ClassVar

import pytest

from structure.tree import ROOT


class Server(BaseHTTPRequestHandler):
    """Writes two tokens; for "full" answers 429, and for "torn" ends in the middle."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["model"])
        if body["model"] == "full":
            self.send_error(429, "no room")
            return
        told = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"choices": [], "usage": {"completion_tokens": 2}}]
        text = "".join(f"data: {json.dumps(one)}\n\n" for one in told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text) + (body["model"] == "torn")))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Server.asked = []
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_is_not_served_is_said_and_not_requested_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    traffic: Any = import_module("harness.traffic")
    load = traffic.Load(streams=1, requests=3, tokens=2)
    found = traffic.traffic(url, traffic.Law(["good"]), load, seed=0)
    assert found.tokens == 6 and len(found.first) == len(found.each) == 3
    for model, why in (("full", "429"), ("torn", "RemoteProtocolError")):
        Server.asked.clear()
        with pytest.raises(SystemExit, match=f"(?s)3 of 3 requests were not served.*{model}.*{why}"):
            traffic.traffic(url, traffic.Law([model]), load, seed=0)
        assert Server.asked == [model]


def test_rounds_that_count_draw_other_adapters_than_the_one_that_does_not(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    traffic: Any = import_module("harness.traffic")
    load = traffic.Load(streams=1, requests=2, tokens=2)
    traffic.rounds_of(url, 0, {"many": traffic.Law([f"n{number}" for number in range(1000)])}, load, 3)
    assert len(set(Server.asked)) == len(Server.asked) == 8

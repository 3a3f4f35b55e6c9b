"""Connections that are slow, many or never end hold up no other, and the server stops in time."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from lorakeet.serve.routes import openai
from lorakeet.serve.routes.connections import MOST, RESERVE, ConnectionLimits, Connections, client_address
from lorakeet.serve.routes.reply import HttpReply
from lorakeet.serve.service import RequestLimits
from serve.routes.test_http import BODY, idle, post, until
from tiny.prepared import Prepared

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Half: "


def connect(served: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=30)


def everything(opened: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    try:
        while piece := opened.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize("sent", [b"", HALF, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_do_not_come_end_the_connection(sent: bytes, site: Callable[..., Any]) -> None:
    served = site(connections=ConnectionLimits(header=0.3))
    with connect(served) as half:
        half.sendall(sent)
        answer = everything(half)
    assert answer.startswith(b"HTTP/1.1 200" if b"health" in sent else b"HTTP/1.1 408")
    assert answer.count(b"HTTP/1.1 408") == 1  # after an answer too, the next headers have their time


def test_a_byte_now_and_then_does_not_help(site: Callable[..., Any]) -> None:
    served = site(connections=ConnectionLimits(header=0.5))
    with connect(served) as half:
        stop = threading.Event()

        def trickle() -> None:
            half.sendall(HALF)
            while not stop.wait(0.05):
                try:
                    half.sendall(b"x")
                except OSError:
                    return

        sending = threading.Thread(target=trickle)
        sending.start()
        assert everything(half).startswith(b"HTTP/1.1 408")
        stop.set()
        sending.join()


def test_those_that_wait_make_place_for_new_ones(site: Callable[..., Any]) -> None:
    served = site(connections=ConnectionLimits(total=4, header=600.0))
    book = served.server.connections
    waiting = [connect(served) for _ in range(30)]
    for opened in waiting:
        opened.sendall(HALF)
    for _ in range(3):
        assert post(served, json=BODY).status_code == 200
    assert book.count <= 4 and book.displaced >= 26 and book.refused == 0
    assert all(everything(opened) == b"" for opened in waiting[:20]), "the first ones were closed"
    for opened in waiting:
        opened.close()
    until(lambda: idle(served) and book.count == 0 and not book.by_address)


@pytest.mark.slow
def test_streams_write_on_while_many_connections_trickle(site: Callable[..., Any]) -> None:
    served = site(slots=16, connections=ConnectionLimits(total=40, header=1.0))
    body = {**BODY, "max_tokens": 60}
    expected = post(served, json=body).json()["choices"][0]["text"]
    slow = [connect(served) for _ in range(120)]
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.02):
            for opened in slow:
                with contextlib.suppress(OSError):
                    opened.sendall(b"x")

    def stream(_: int) -> str:
        with httpx.stream("POST", f"{served.url}/v1/completions", json={**body, "stream": True}, timeout=60) as lines:
            pieces = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
        return "".join(piece["choices"][0]["text"] for piece in pieces)

    sending = threading.Thread(target=trickle)
    sending.start()
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(stream, range(32)))
    over.set()
    sending.join()
    for opened in slow:
        opened.close()
    assert texts == [expected] * 32 and served.server.connections.refused == 0 and served.server.connections.displaced > 80


def test_where_all_are_busy_the_next_one_is_refused(site: Callable[..., Any]) -> None:
    served = site(connections=ConnectionLimits(total=2, header=600.0))
    assert post(served, json=BODY).status_code == 200
    gate = threading.Event()
    blocked = served.service.engine.call(gate.wait)
    raw = json.dumps(BODY).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(raw)
    busy = [connect(served) for _ in range(2)]
    for opened in busy:
        opened.sendall(head + raw)
    until(lambda: served.service.engine.load == (0, 2))
    refused = httpx.get(f"{served.url}/health")
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    gate.set()
    assert blocked.result() and all(everything(opened).startswith(b"HTTP/1.1 200") for opened in busy)
    for opened in busy:
        opened.close()
    assert post(served, json=BODY).status_code == 200 and served.server.connections.refused == 1


def test_a_client_loses_no_request_to_that_number(site: Callable[..., Any]) -> None:
    served = site(connections=ConnectionLimits(requests=3))
    with httpx.Client(base_url=served.url, timeout=60) as client:
        assert [client.get("/health").status_code for _ in range(200)] == [200] * 200


def test_a_client_that_never_reads_loses_its_answer(site: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def large(*_: Any) -> HttpReply:
        return HttpReply("x" * (64 << 20))

    monkeypatch.setattr(openai, "models", large)
    served = site(connections=ConnectionLimits(unread=0.3, header=600.0))
    with connect(served) as deaf:
        deaf.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: served.server.connections.count == 1)
        until(lambda: served.server.connections.count == 0)
        assert len(everything(deaf)) < 64 << 20


class Stub:
    """A connection that only notes its end."""

    def __init__(self, book: Connections, address: str) -> None:
        self.book, self.address, self.ended = book, address, False
        self.taken = book.admit(self, address)  # type: ignore[arg-type]

    def end(self) -> None:
        self.ended = True
        self.book.leave(self, self.address)  # type: ignore[arg-type]


def test_one_address_takes_no_more_than_its_share() -> None:
    book = Connections(ConnectionLimits(total=8, per_address=3))
    ours, theirs = [[Stub(book, address) for _ in range(5)] for address in ("192.0.2.1", "192.0.2.2")]
    assert [stub.ended for stub in ours] == [True, True, False, False, False] == [stub.ended for stub in theirs]
    for stub in theirs[2:]:
        book.begin(stub)  # type: ignore[arg-type]
    assert not Stub(book, "192.0.2.2").taken, "all of its own are busy, and others are left alone"
    assert not any(stub.ended for stub in ours[2:]) and book.count == 6
    more = [Stub(book, f"198.51.100.{number}") for number in range(5)]
    assert all(stub.taken for stub in more) and book.count == 8
    assert all(stub.ended for stub in ours), "of the address of which most wait, then those that wait longest"
    assert not any(stub.ended for stub in theirs[2:])
    for stub in (*ours, *theirs, *more):
        book.leave(stub, stub.address)  # type: ignore[arg-type]
    assert book.count == 0 and not book.by_address


def test_addresses() -> None:
    assert client_address("2001:db8:1:2:3::4") == client_address("2001:db8:1:2:ffff::1") == "2001:db8:1:2::/64"
    assert client_address("::ffff:192.0.2.1") == client_address("192.0.2.1") == "192.0.2.1"
    assert (client_address("fe80::1%eth0"), client_address("::1"), client_address("")) == ("fe80::/64", "::1", "")
    limits = ConnectionLimits(total=100)
    assert [limits.most_of(address) for address in ("127.0.0.1", "::1", "192.0.2.1", "")] == [100, 100, 50, 50]


def test_the_default_leaves_open_files_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((256, 256 - RESERVE), (1 << 20, MOST), (10, 16), (-1, MOST)):
        monkeypatch.setattr("resource.getrlimit", lambda _, files=files: (files, files))
        assert ConnectionLimits().most == most


def test_half_a_body_does_not_keep_the_server(site: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    served = site(limits=RequestLimits(stop=0.4))
    with connect(served) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")  # and no more
        until(lambda: served.server.connections.count == 1)
        served.stop()  # which would wait for `pause`, a minute
    assert not served.service.engine.ready
    assert not [record for record in caplog.records if record.name == "uvicorn.error"], "the client's doing is no error"


STUCK = """
import asyncio, threading, sys
from types import SimpleNamespace
from lorakeet.serve.routes import http
from lorakeet.serve.routes import openai
from lorakeet.serve.routes.reply import HttpReply
from lorakeet.serve.service import RequestLimits
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def stuck(request):
    print("in a thread", flush=True)
    await asyncio.to_thread(threading.Event().wait)  # as a thread that reads a pipe to which nothing is written

http.build_app = lambda service: Starlette(routes=[Route("/", stuck)])
service = SimpleNamespace(limits=RequestLimits(stop=1.0), engine=SimpleNamespace(cut=lambda: None))
http.run_server(service, host="127.0.0.1", port=0, ready=lambda port: print(port, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "codes"), [(signal.SIGTERM, (-15, 128 + 15)), (signal.SIGINT, (128 + 2,))])
def test_a_thread_that_never_ends_does_not_keep_the_server(sent: int, codes: tuple[int, ...], prepared: Prepared) -> None:
    with prepared.python(STUCK) as process:
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=30) as opened:
            opened.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET")
            assert process.stdout.readline() == "in a thread\n"
            process.send_signal(sent)
            assert process.wait(timeout=60) in codes


FEW_FILES = """
import resource, sys
from types import SimpleNamespace
from lorakeet.serve.routes import http
from lorakeet.serve.service import RequestLimits
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def answer(request):
    return PlainTextResponse("ok")

http.build_app = lambda service: Starlette(routes=[Route("/", answer)])
service = SimpleNamespace(limits=RequestLimits(stop=1.0), engine=SimpleNamespace(cut=lambda: None))
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
http.run_server(service, host="127.0.0.1", port=0, ready=lambda port: print(port, flush=True))
"""


def test_an_idle_server_ends_at_once_whatever_time_streams_would_have(prepared: Prepared) -> None:
    """Ctrl-C beside an open connection that asks for nothing: the hour that running texts would have is not waited for."""
    idle = FEW_FILES.replace("stop=1.0", "stop=3600.0")
    with prepared.python(idle) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{int(process.stdout.readline())}", timeout=30) as client:
            assert client.get("/").text == "ok"
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        assert "stopped at once" not in process.stderr.read()


def test_more_connections_than_open_files_leave_others_their_answers(prepared: Prepared) -> None:
    """They come faster than the places of the first ones are free: a round of accepting takes only a few."""
    with prepared.python(FEW_FILES) as process:
        opened: list[socket.socket] = []
        try:
            port = int(process.stdout.readline())
            for _ in range(4):
                opened += [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(100)]
                for half in opened[-100:]:
                    with contextlib.suppress(OSError):
                        half.sendall(HALF)
                assert httpx.get(f"http://127.0.0.1:{port}/", timeout=30).text == "ok"
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            assert "Too many open files" not in process.stderr.read()
        finally:
            for half in opened:
                half.close()

"""Answers of a server that may be anyone's: bounded in bytes and in time."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lorakeet.errors import EnvironmentProblem
from lorakeet.serve.listening import LOOPBACK

Answer = TypeVar("Answer")
MOST_ANSWER = 64 << 20  # bytes
LONGEST_LINE = 1 << 20  # bytes of a streamed event
SILENCE = 300.0  # seconds without a byte
LONGEST_WAIT = 600.0  # seconds until the headers are whole, and for the rest of an answer that is no stream
LONGEST_STREAM = 3600.0  # seconds
_PIECE = 1 << 16
_SHOWN = 500  # bytes of what a server says of an error


class _Timed(HTTPConnection):
    """A connection that ends if the headers of the answer are not whole in time."""

    def getresponse(self) -> HTTPResponse:
        def cut() -> None:
            if self.sock is not None:
                self.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(LONGEST_WAIT, cut)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()


class _TimedTls(_Timed, HTTPSConnection):
    """The same with TLS."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect with a key: it would be sent to another place."""

    def redirect_request(self, req: urllib.request.Request, *given: Any) -> urllib.request.Request | None:
        return None if req.has_header("Authorization") else super().redirect_request(req, *given)


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Timed, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_TimedTls, context=self._context), req)  # type: ignore[attr-defined]


def open_answer(url: str, body: Mapping[str, Any] | None = None, *, key: str = "") -> Any:
    """The open answer to a GET, or to a POST of `body` as JSON; `key` is sent as a bearer token.

    Raises what urllib raises: OSError, ValueError, HTTPException.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, data=data, headers=headers)
    direct = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []  # a proxy has another loopback
    return urllib.request.build_opener(_Http, _Https, _Stay, *direct).open(request, timeout=SILENCE)


def read_answer(response: Any) -> bytes:
    """The whole answer. EnvironmentProblem for one that is larger than MOST_ANSWER, or takes longer than LONGEST_WAIT."""
    return b"".join(_pieces(response, LONGEST_WAIT))


def answer_lines(response: Any) -> Iterator[bytes]:
    """The lines of a stream. EnvironmentProblem for a line or a stream that is too long, in bytes or in time."""
    rest = b""
    for piece in _pieces(response, LONGEST_STREAM):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
        if len(rest) > LONGEST_LINE:
            raise EnvironmentProblem(f"{response.url} sends a line of more than {LONGEST_LINE:,} bytes. {_ADVICE}")
    if rest:
        yield rest


_ADVICE = "That is no answer of a model; correct the address."


def _pieces(response: Any, seconds: float) -> Iterator[bytes]:
    began, size = time.monotonic(), 0
    while piece := response.read1(_PIECE):
        size += len(piece)
        if size > MOST_ANSWER:
            raise EnvironmentProblem(f"{response.url} answers with more than {MOST_ANSWER:,} bytes. {_ADVICE}")
        if time.monotonic() - began > seconds:
            raise EnvironmentProblem(f"The answer of {response.url} was not whole after {seconds:,.0f} s. {_ADVICE}")
        yield piece


class CallRefused(EnvironmentProblem):
    """The server answered, but not this call; `status` is HTTP's."""

    CODE = "server-refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, values={"status": status})
        self.status = status


def called_again(
    call: Callable[[], Answer], busy: Container[int], pauses: Sequence[float], pause: Callable[[float], object]
) -> Answer:
    """What `call` returns. Where it raises CallRefused with a `busy` code, it is called again after each of `pauses`, in seconds.

    The last refusal is raised.
    """
    for wait in pauses:
        try:
            return call()
        except CallRefused as error:
            if error.status not in busy:
                raise
        pause(wait)
    return call()


def refusal_of(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, with its status: "(404 Not Found): no such model". Closes the answer."""
    said = "what else it says cannot be read"
    with error, suppress(OSError, HTTPException):
        said = error.fp.read1(_SHOWN).decode("utf-8", "replace")  # type: ignore[attr-defined]
    return f"({error.code} {error.reason}): {said}"

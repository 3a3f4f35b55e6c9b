"""The HTTP server: routes, keys, errors in each API's form, limits on bodies, logs, and shutdown without loss."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import islice
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, LorakeetError, VerificationFailed
from lorakeet.kernels.threads import compute_alone
from lorakeet.serve.access import Caller, NotAllowed, QuotaSpent
from lorakeet.serve.engine import Draining, QueueFull
from lorakeet.serve.listening import listening_socket
from lorakeet.serve.model_names import UnknownModel
from lorakeet.serve.registry import AdapterMemoryFull
from lorakeet.serve.routes import adapters, ollama, openai
from lorakeet.serve.routes.adapters import TooLarge
from lorakeet.serve.routes.connections import BoundedProtocol, ConnectionLimits, Connections, protocol_within
from lorakeet.serve.routes.reply import HttpReply, Stalled, body_pieces
from lorakeet.serve.service import Service
from lorakeet.serve.upload_space import UploadsFull

Handler = Callable[[HttpRequest], Awaitable[Response]]
_STATUS: tuple[tuple[type[Exception], int, str], ...] = (  # the first that matches: more specific ones come first
    (UnknownModel, 404, "NotFoundError"),
    (QueueFull, 429, "rate_limit_error"),
    (QuotaSpent, 429, "rate_limit_error"),
    (Draining, 503, "unavailable"),
    (AdapterMemoryFull, 503, "unavailable"),
    (Stalled, 408, "invalid_request_error"),
    (TooLarge, 413, "invalid_request_error"),
    (UploadsFull, 507, "storage_error"),
    (VerificationFailed, 422, "verification_failed"),
    (ConfigError, 400, "invalid_request_error"),
    (DataError, 400, "invalid_request_error"),
    (EnvironmentProblem, 503, "unavailable"),
    (LorakeetError, 500, "server_error"),
    (OSError, 507, "storage_error"),
    (MemoryError, 503, "unavailable"),
)
MOST_FIELDS = 50_000  # of a JSON body, in all its objects
MOST_BRACKETS = 200_000  # of objects and arrays, and in texts; no prompt of a model's context has as many
_FIELD = re.compile(rb'(?<!\\)"\s*:')
ACCEPTED_AT_ONCE = 16  # connections, before those that they displace are closed
_QUEUE = 2048  # connections that wait to be accepted
_MEMORY_FULL_SECONDS = 1  # until an adapter in use may be free
_NO_EMBEDDINGS = (
    "This server has no embeddings: its models write text, and were trained to predict the next token. Means or last states of "
    "them do not place texts of equal meaning near each other as an embedding model does. Serve such a model beside it, with "
    "llama-server --embeddings or vllm serve --runner pooling."
)
log = logging.getLogger("lorakeet.serve")


def build_app(service: Service) -> Starlette:
    """The application. No CORS headers are ever sent, so that a page from elsewhere cannot read an answer."""

    async def model(request: HttpRequest) -> Response:
        return _sent(await openai.model(service, _caller(service, request), str(request.path_params["name"])))

    async def embeddings(request: HttpRequest) -> Response:
        _caller(service, request)
        return _refused(request, _NO_EMBEDDINGS, 501, "not_supported_error")

    routes = [
        Route("/healthz", _plain(service, lambda: PlainTextResponse("ok"))),
        Route("/health", _plain(service, lambda: PlainTextResponse("ok"))),  # vLLM's and llama.cpp's name
        Route("/readyz", _plain(service, lambda: _ready(service))),
        Route("/metrics", _of_caller(service, lambda caller: _metrics(service, caller))),
        Route("/v1/models", _of_caller(service, lambda caller: openai.models(service, caller))),
        Route("/v1/models/", _of_caller(service, lambda caller: openai.models(service, caller))),  # no model of an empty name
        Route("/v1/models/{name:path}", _guarded(service, model)),
        Route("/v1/chat/completions", _of_body(service, openai.chat_completions), methods=["POST"]),
        Route("/v1/completions", _of_body(service, openai.completions), methods=["POST"]),
        Route("/v1/embeddings", _guarded(service, embeddings), methods=["POST"]),
        Route("/tokenize", _of_body(service, openai.tokenize), methods=["POST"]),
        Route("/v1/load_lora_adapter", _of_body(service, adapters.load_adapter), methods=["POST"]),
        Route("/v1/unload_lora_adapter", _of_body(service, adapters.unload), methods=["POST"]),
        Route("/lora-adapters", _of_caller(service, lambda caller: adapters.scales(service, caller)), methods=["GET"]),
        Route("/lora-adapters", _of_body(service, adapters.set_scales), methods=["POST"]),
        Route("/api/tags", _of_caller(service, lambda caller: ollama.tags(service, caller))),
        Route("/api/ps", _of_caller(service, lambda caller: ollama.tags(service, caller, loaded=True))),
        Route("/api/version", _of_caller(service, lambda caller: ollama.version(service, caller))),
        Route("/api/show", _of_body(service, ollama.show_model), methods=["POST"]),
        Route("/api/chat", _of_body(service, ollama.ollama_chat), methods=["POST"]),
        Route("/api/generate", _of_body(service, ollama.ollama_generate), methods=["POST"]),
        *_adapter_routes(service),
    ]

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        if service.engine.cores is not None:  # threads that read adapters leave the cores to the engine
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(initializer=compute_alone))
        yield
        await service.settle()  # with the engine still running, which evicts adapters
        await asyncio.to_thread(service.engine.drain, service.limits.stop)

    return Starlette(routes=routes, lifespan=life, exception_handlers={HTTPException: _no_such, Exception: _unforeseen})


def _adapter_routes(service: Service) -> list[Route]:
    def name(request: HttpRequest) -> str:
        return str(request.path_params["name"])

    def upload(request: HttpRequest) -> str:
        return request.query_params.get("upload", "")

    def of_name(answer: Callable[[Service, Caller, str], Awaitable[HttpReply]]) -> Handler:
        async def handle(request: HttpRequest) -> Response:
            return _sent(await answer(service, _caller(service, request), name(request)))

        return _guarded(service, handle)

    async def accept(request: HttpRequest) -> Response:
        caller = _caller(service, request)
        return _sent(await adapters.accept(service, caller, name(request), await _body(service, request), upload(request)))

    async def pin(request: HttpRequest) -> Response:
        return _sent(await adapters.pin(service, _caller(service, request), name(request), await _body(service, request)))

    async def receive(request: HttpRequest) -> Response:
        file = str(request.path_params["file"])
        return _sent(await adapters.receive(service, _caller(service, request), request, name(request), file, upload(request)))

    one = "/v1/adapters/{name}"
    return [
        Route(one, of_name(adapters.show), methods=["GET"]),
        Route(one, _guarded(service, accept), methods=["POST"]),
        Route(one, of_name(adapters.remove), methods=["DELETE"]),
        Route(f"{one}/pin", _guarded(service, pin), methods=["POST"]),
        Route(f"{one}/certificate", of_name(adapters.certify), methods=["POST"]),
        Route(f"{one}/{{file}}", _guarded(service, receive), methods=["PUT"]),
    ]


def run_server(
    service: Service, *, host: str, port: int, ready: Callable[[int], None], connections: ConnectionLimits | None = None
) -> None:
    """Serves until SIGINT or SIGTERM, and at most `service.limits.stop` seconds longer, whatever clients and threads do.

    Texts that have not ended by then are cut. `ready` gets the port when connections are accepted.
    """
    listening = listening_socket(host, port)
    server = BoundedServer(service, ready, connections)
    try:
        server.run([listening])
    finally:
        if server.watch is not None:
            server.watch.cancel()


class BoundedServer(uvicorn.Server):
    """uvicorn's server over `service`, with bounds on connections and on the time that it takes to stop."""

    def __init__(self, service: Service, ready: Callable[[int], None], limits: ConnectionLimits | None = None) -> None:
        """`ready` gets the port when the server listens."""
        self.connections = Connections(limits or ConnectionLimits())
        config = uvicorn.Config(
            build_app(service), host="127.0.0.1", port=0, http=protocol_within(self.connections), ws="none",
            log_level="warning", access_log=False, server_header=False, backlog=ACCEPTED_AT_ONCE,
        )  # fmt: skip
        super().__init__(config)
        self._service, self._ready = service, ready
        self.watch: threading.Timer | None = None  # ends the process after a signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop. The process ends in time even if a thread never does; all that is kept is on the disk already."""
        if not self.should_exit:
            self.watch = threading.Timer(0.95 * self._service.limits.stop, _end_process, (sig,))
            self.watch.daemon = True
            self.watch.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Lets running texts end for half of the time, then cuts them, and then closes connections that are still open."""
        stop, later = self._service.limits.stop, asyncio.get_running_loop().call_later
        timers = later(0.5 * stop, self._service.engine.cut), later(0.7 * stop, self._close_all)
        self.config.timeout_graceful_shutdown = 0.8 * stop  # type: ignore[assignment]  # asyncio takes fractions
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()

    def _close_all(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.end()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            for listening in self.servers[0].sockets:  # asyncio's own number is that of one round, and the system's queue
                with socket.socket(fileno=os.dup(listening.fileno())) as same:
                    same.listen(_QUEUE)
            self._ready(self.servers[0].sockets[0].getsockname()[1])


def _end_process(number: int) -> None:
    """Ends the process, as the signal would."""
    log.warning("stopped at once: a request or a thread did not end")
    os._exit(128 + number)


def _plain(service: Service, answer: Callable[[], Response]) -> Handler:
    """A route that needs no key."""

    async def handle(request: HttpRequest) -> Response:
        _require_own_host(service, request)
        return answer()

    return _guarded(service, handle)


def _sent(reply: HttpReply) -> Response:
    if isinstance(reply.body, str):
        return Response(reply.body, reply.status, media_type=reply.media)
    return StreamingResponse(reply.body, reply.status, media_type=reply.media)


def _of_caller(service: Service, answer: Callable[[Caller], Awaitable[HttpReply]]) -> Handler:
    """A route that reads only the caller."""

    async def handle(request: HttpRequest) -> Response:
        return _sent(await answer(_caller(service, request)))

    return _guarded(service, handle)


def _of_body(service: Service, answer: Callable[[Service, Caller, HttpRequest, Any], Awaitable[HttpReply]]) -> Handler:
    """A route that reads a JSON body."""

    async def handle(request: HttpRequest) -> Response:
        caller = _caller(service, request)
        return _sent(await answer(service, caller, request, await _body(service, request)))

    return _guarded(service, handle)


def _guarded(service: Service, handle: Handler) -> Handler:
    """Turns errors into replies: as vLLM and OpenAI do, or as Ollama does on its paths."""

    async def answer(request: HttpRequest) -> Response:
        try:
            return await handle(request)
        except ClientDisconnect:
            return Response(status_code=499)  # never read
        except (LorakeetError, OSError, MemoryError) as error:
            status, kind = next((status, kind) for known, status, kind in _STATUS if isinstance(error, known))
            if isinstance(error, NotAllowed):
                status, kind = error.status, "authentication_error"
            message = _words_of(error)
            path, said = json.dumps(request.url.path), json.dumps(message[:500])
            about = f"refused path={path} status={status} reason={said}"
            log.warning("%s", service.access.without_keys(about, request.headers.get("authorization")))
            seconds = getattr(error, "retry_after", _MEMORY_FULL_SECONDS if isinstance(error, AdapterMemoryFull) else None)
            headers = {} if seconds is None else {"Retry-After": str(seconds)}
            return _refused(request, message, status, kind, headers)

    return answer


def _words_of(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "This request needs more memory than the server has; send a smaller one."
    return f"The server's disk refuses: {error.strerror}." if isinstance(error, OSError) else str(error)


def _refused(request: HttpRequest, message: str, status: int, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the form of OpenAI and vLLM, or of Ollama on its paths."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status, headers)
    code = "model_not_found" if status == 404 and kind == "NotFoundError" else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


async def _no_such(request: HttpRequest, error: Exception) -> Response:
    """No such path, or another method."""
    status, headers = getattr(error, "status_code", 404), getattr(error, "headers", None)
    message = f"There is no {request.method} {request.url.path} here; docs/how-to/serve.md lists what there is."
    return _refused(request, message, status, "invalid_request_error", headers)


async def _unforeseen(request: HttpRequest, error: Exception) -> Response:
    """A bug of the server; Starlette raises it again, so that the log shows where."""
    message = f"The server has failed at this request ({type(error).__name__}); its log says where. Please report this."
    return _refused(request, message, 500, "server_error")


def _caller(service: Service, request: HttpRequest) -> Caller:
    _require_own_host(service, request)
    return service.access.caller(request.headers.get("authorization"))


def _require_own_host(service: Service, request: HttpRequest) -> None:
    """Raises NotAllowed for strangers' pages. Without keys, pages of other origins are refused.

    A browser sends their posts, even if it shows them no answer.

    So are host names that may have been pointed at this machine (DNS rebinding); local names are accepted.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if service.access.open and origin is not None and origin.partition("://")[2] != host:
        raise NotAllowed(f"Pages of {origin[:100]} may not use this server; ask without a browser, or start it with --keys.", 403)
    if service.access.open and not _local(host):
        raise NotAllowed(f"This server is not {host[:100]}; ask it as localhost, or start it with --keys.", 403)


def _local(host: str) -> bool:
    """True if a Host header is an IP address, or a name that no public DNS resolves."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith((".localhost", ".local", ".internal"))
    return True


async def _body(service: Service, request: HttpRequest) -> Any:
    """The JSON of a request; an empty body is an empty object."""
    raw = bytearray()
    async for piece in body_pieces(request, service.limits.pause):
        raw += piece
        if len(raw) > service.limits.body:
            raise TooLarge(f"The request is larger than the {service.limits.body:,} bytes that this server takes.")
    if sum(1 for _ in islice(_FIELD.finditer(raw), MOST_FIELDS + 1)) > MOST_FIELDS:  # before the parser, for which all texts wait
        raise ConfigError(f"The request has more than {MOST_FIELDS:,} fields; expected the few of its call.")
    if raw.count(b"[") + raw.count(b"{") > MOST_BRACKETS:
        raise ConfigError(f"The request has more than {MOST_BRACKETS:,} brackets [ and {{; shorten it, or send several.")
    try:
        data = json.loads(raw) if raw else {}
        if b"\\u" in raw or not raw.isascii():  # JSON can contain surrogates, which cannot be encoded in UTF-8
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError("The request has half of a character (\\ud800 … \\udfff, a surrogate); leave it out.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The request is not JSON: {error}.") from error
    return data


def _ready(service: Service) -> Response:
    if service.engine.ready:
        return PlainTextResponse("ready")
    return PlainTextResponse(service.engine.failure or "not ready", 503)


async def _metrics(service: Service, caller: Caller) -> HttpReply:
    caller.require_admin()
    running, waiting = service.engine.load
    registry = service.registry
    gauges: dict[str, float] = {
        "running_texts": running,
        "waiting_texts": waiting,
        "engine_steps": service.engine.steps,
        "adapters_known": len(registry.names),
        "adapters_resident": registry.resident,
        "adapters_resident_bytes": registry.resident_bytes,
        "kv_cache_bytes": service.engine.cache.bytes,
    }
    page = service.metrics.text(gauges, lambda name: name == service.base or caller.sees(name))
    return HttpReply(page, "text/plain; version=0.0.4")

"""A server that answers with whatever a test gives it, as a stranger's may."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def answering(pieces: Iterable[bytes], *, raw: bool = False) -> Iterator[str]:
    """The address of a server that answers each request with `pieces`, as they come; `raw`: from the status line on."""
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not raw:
                self.send_response(200)
                self.end_headers()
            with contextlib.suppress(OSError):  # the client has gone
                for piece in pieces:
                    if ending.is_set():
                        return
                    self.wfile.write(piece)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ending.set()
        server.shutdown()
        server.server_close()
        thread.join()

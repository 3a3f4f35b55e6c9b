"""lorakeet serve on a free port of this machine, in a thread."""

from __future__ import annotations

import queue
import threading
from typing import Any

import uvicorn

from lorakeet.serve.routes.http import _UvicornServer, build_app
from lorakeet.serve.service import Service


class Site:
    """A server over `service`, with its address in `url`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._server: Any = None
        ready: queue.SimpleQueue[int] = queue.SimpleQueue()
        config = uvicorn.Config(build_app(service), host="127.0.0.1", port=0, log_level="warning", access_log=False)
        self._server = _UvicornServer(config, ready.put)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        self.url = f"http://127.0.0.1:{ready.get(timeout=30)}"

    def stop(self) -> None:
        """As SIGTERM stops it: what was begun ends first."""
        self._server.should_exit = True
        self._thread.join()

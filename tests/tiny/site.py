"""lorakeet serve on a free port of this machine, in a thread."""

from __future__ import annotations

import queue
import threading

from lorakeet.serve.routes.connections import ConnectionLimits
from lorakeet.serve.routes.http import BoundedServer
from lorakeet.serve.service import Service


class Site:
    """A server over `service`, with its address in `url`."""

    def __init__(self, service: Service, connections: ConnectionLimits | None = None) -> None:
        self.service = service
        ready: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.server = BoundedServer(service, ready.put, connections)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        self.url = f"http://127.0.0.1:{ready.get(timeout=30)}"

    def stop(self) -> None:
        """As SIGTERM stops it: what was begun ends first, within the seconds of its limits."""
        self.server.should_exit = True  # without a signal, which would end this process in time
        self._thread.join()

"""Connections of the server: how many in all and of one address, and how long one may take for headers or not read its answer.

A connection is *waiting* until the headers of its next request are whole, and *busy* from then until the answer is sent. At a
limit a new connection takes the place of the one that has waited longest; if all are busy, it is answered with 503.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
from collections import Counter, OrderedDict
from dataclasses import dataclass

from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 1000  # connections by default
RESERVE = 128  # open files that connections leave to the rest of the process
_FEWEST = 16
_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
log = logging.getLogger("lorakeet.serve")


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may take. `total` None: as many as open files allow, at most MOST. `per_address` None: half of all."""

    total: int | None = None
    per_address: int | None = None  # of this machine's own addresses always `total`: a proxy may stand there
    header: float = 10.0  # seconds from the connection, or the last answer, until the headers of a request are whole
    unread: float = 60.0  # seconds in which a client reads nothing of an answer that waits
    requests: int = 1000  # of one connection

    @property
    def most(self) -> int:
        """The connections in all."""
        return self.total or max(_FEWEST, min(MOST, _open_files() - RESERVE))

    def most_of(self, address: str) -> int:
        """The connections of one address (`client_address`)."""
        return self.most if _is_local(address) else self.per_address or max(1, self.most // 2)


class Connections:
    """All connections of a server by address, those that wait in the order in which they began to."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.by_address: dict[str, set[BoundedProtocol]] = {}
        self._waiting: OrderedDict[BoundedProtocol, str] = OrderedDict()  # their addresses
        self.count = 0
        self.displaced = 0  # waiting connections that were closed for new ones
        self.refused = 0
        self.leaving = 0  # refused ones that are still open

    def admit(self, new: BoundedProtocol, address: str) -> bool:
        """Adds a connection, for which a waiting one may be closed; False if there is no place."""
        of_address = self.by_address.setdefault(address, set())
        crowded = len(of_address) >= self.limits.most_of(address)
        if (crowded or self.count >= self.limits.most) and not self._displace(address if crowded else None):
            self.refused += 1
            if not of_address:
                del self.by_address[address]
            return False
        self.by_address.setdefault(address, of_address).add(new)
        self.count += 1
        self.wait(new, address)
        return True

    def wait(self, connection: BoundedProtocol, address: str) -> None:
        """Notes that a connection waits for headers from now."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = address

    def begin(self, connection: BoundedProtocol) -> None:
        """Notes that a connection is busy."""
        self._waiting.pop(connection, None)

    def leave(self, connection: BoundedProtocol, address: str) -> None:
        """Removes a connection, if it was admitted."""
        of_address = self.by_address.get(address, set())
        if connection in of_address:
            of_address.discard(connection)
            self.count -= 1
            self._waiting.pop(connection, None)
            if not of_address:
                del self.by_address[address]

    def _displace(self, address: str | None) -> bool:
        """Closes the connection that has waited longest, of an address, or else of that of which most connections wait."""
        if address is None:
            address = max(self._waiting.values(), key=Counter(self._waiting.values()).__getitem__, default=None)
        oldest = next((found for found, its in self._waiting.items() if its == address), None)
        if oldest is None:
            return False
        self.displaced += 1
        oldest.end()
        return True


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol of one connection, within the limits of `book`, which `protocol_within` sets."""

    book: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for headers, or refuses the connection."""
        super().connection_made(transport)
        self._address = client_address(self.client[0] if self.client else "")
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._requests = 0
        self._refused = not self.book.admit(self, self._address)
        if not self._refused:
            self._wait_for_headers()
            return
        transport.write(_FULL)
        if self.book.leaving < RESERVE // 4:  # what comes is read first: else the system may drop the answer
            self.book.leaving += 1
            self._timer = self.loop.call_later(1.0, transport.abort)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Makes place for another."""
        if self._refused and self._timer is not None:
            self.book.leaving -= 1
        self._stop_timers()
        self.book.leave(self, self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what has come; of a refused connection nothing."""
        if self._refused:
            self.transport.close()
        else:
            super().data_received(data)

    def handle_events(self) -> None:
        """Reads what has come; with the end of the headers the connection is busy."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._requests += 1
            if self._requests >= self.book.limits.requests:
                # uvicorn says so in its answer to a client that wants it; without it the client's next request would be lost
                self.cycle.scope["headers"] = [*self.cycle.scope["headers"], CLOSE_HEADER]
            if self._timer is not None:
                self._timer.cancel()
            self.book.begin(self)

    def on_response_complete(self) -> None:
        """Waits for the next headers; also where the body of the answered request is still coming."""
        if not self.transport.is_closing():
            self.book.wait(self, self._address)
            self._wait_for_headers()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read: its answer waits in memory, and an adapter for its end."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.book.limits.unread, self.end)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def end(self) -> None:
        """Closes the connection at once, with what is not sent."""
        self._stop_timers()
        self.book.leave(self, self._address)
        self.transport.abort()

    def _wait_for_headers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.book.limits.header, self._too_late)

    def _too_late(self) -> None:
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self.transport.write(_LATE)
            self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()


def protocol_within(connections: Connections) -> type[BoundedProtocol]:
    """The protocol class of a server with these `connections`, for uvicorn."""
    return type("BoundedProtocol", (BoundedProtocol,), {"book": connections})


def client_address(host: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 network that one customer has in IPv6."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(found) if found.is_loopback else str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def _is_local(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST + RESERVE if soft == resource.RLIM_INFINITY else soft

"""The address that a server listens on."""

from __future__ import annotations

import socket

from lorakeet.errors import ConfigError, EnvironmentProblem, Remedy

LARGEST_PORT = 65535
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # which no other machine reaches


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that accepts connections at `host` and `port`; 0 picks a free one.

    Raises ConfigError for a number that is no port, EnvironmentProblem if the address is another's or in use.
    """
    if not 0 <= port <= LARGEST_PORT:
        raise ConfigError(f"--port is {port}; expected 0 to {LARGEST_PORT}, such as 8000. 0 picks a free one.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise EnvironmentProblem(
            f"The server cannot listen on {host}:{port}: {error.strerror or error}. Choose another --host or --port.",
            code="port-in-use",
            values={"host": host, "port": port},
            remedies=[Remedy("port", "0", "Take a free port")],
        ) from error


def require_free_port(host: str, port: int) -> None:
    """Raises as `listening_socket` where nothing can listen now; listens no longer than to find out."""
    listening_socket(host, port).close()

"""The address of a server: free, in use, or no address."""

from __future__ import annotations

import socket

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.serve.listening import listening_socket, require_free_port


def test_a_free_port_is_listened_on_and_can_be_taken_after_it_was_checked() -> None:
    with listening_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf"cannot listen on 127\.0\.0\.1:{port}.*Choose another --host or --port"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port is {port}; expected 0 to 65535"):
        require_free_port("127.0.0.1", port)

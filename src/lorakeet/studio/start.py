"""`lorakeet studio`: the page of this machine's runs, in the browser."""

from __future__ import annotations

import fcntl
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import uvicorn
from rich.console import Console

from lorakeet.disk import open_in_place
from lorakeet.errors import LorakeetError
from lorakeet.runs.terminal import print_address
from lorakeet.serve.listening import listening_socket
from lorakeet.studio.app import make_studio, studio_app
from lorakeet.studio.jobs import Starter
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import Places
from lorakeet.studio.trial import close_trial
from lorakeet.verbs.early.studio_options import LOOPBACK_ADDRESS, require_studio
from lorakeet.verbs.options import StudioOptions


@dataclass(frozen=True)
class Studied:
    """Where the studio was."""

    runs: Path

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"runs": str(self.runs)}


def _free_memory(studio: Studio, opened: BinaryIO) -> None:
    """Ends the model that was loaded to be tried, if no other studio is open on the folder."""
    with suppress(BlockingIOError, LorakeetError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        close_trial(studio.queue)


class StudioServer(uvicorn.Server):
    """uvicorn's server; streams of events end when it does."""

    def __init__(self, studio: Studio) -> None:
        config = uvicorn.Config(
            studio_app(studio), ws="none", lifespan="off", log_config=None, log_level=logging.ERROR, access_log=False,
            server_header=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        super().__init__(config)
        self._studio = studio

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop."""
        self._studio.closing.set()
        super().handle_exit(sig, frame)


def studio(options: StudioOptions, *, console: Console) -> Studied:
    """Serves the page to this machine's browser until Ctrl-C. Jobs that run go on without it.

    Raises ConfigError and EnvironmentProblem for a port that cannot be used, and for packages or folders that are missing.
    """
    require_studio(options)
    found = make_studio(Places.of(options.runs, options.folder))
    listening = listening_socket(LOOPBACK_ADDRESS, options.port)
    port = listening.getsockname()[1]
    console.print(f"The studio of {found.places.runs} is open at", soft_wrap=True)
    address = f"http://{LOOPBACK_ADDRESS}:{port}/?token={found.token}"
    console.print(f"  {address}", soft_wrap=True)
    print_address(console, address, port)
    said = "The address is a key: share it with no other user of this machine. Ctrl-C closes the studio; jobs that run go on."
    console.print(said, soft_wrap=True)
    server = StudioServer(found)
    with open_in_place(found.places.own / "open") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        with Starter(found.queue.start_waiting), suppress(KeyboardInterrupt):
            server.run([listening])
        _free_memory(found, opened)
    found.workbench.close()
    console.print("The studio is closed.")
    return Studied(found.places.runs)

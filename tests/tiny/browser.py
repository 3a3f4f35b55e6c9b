"""Debian's Chromium, driven by Playwright, and studios that it opens: in a process of their own, or in this one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window. Skips with a word where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra lorakeet[test], drives the browser")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium ({', '.join(NAMES)}) is installed; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        try:
            yield browser
        finally:
            browser.close()


class StudioProcess:
    """`lorakeet studio` as a user starts it; it can be killed and started again on the same port."""

    def __init__(self, runs: Path, *folders: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.words = ["--runs", str(runs), *(word for folder in folders for word in ("--folder", str(folder)))]
        self.process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self) -> str:
        """The address that it prints."""
        command = [sys.executable, "-m", "lorakeet", "studio", *self.words, "--port", str(self.port)]
        given = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given)
        assert self.process.stdout is not None
        said = [self.process.stdout.readline() for _ in range(3)]
        found = re.search(r"http://\S+", "".join(said))
        assert found, said
        self.address = found[0]
        return self.address

    def end(self, *, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.communicate()
            self.process = None


@contextmanager
def studio_here(studio: Any) -> Iterator[str]:
    """Serves a studio from a thread of this process; yields the address with the token."""
    from lorakeet.studio.start import StudioServer

    server = StudioServer(studio)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token={studio.token}"
    finally:
        studio.closing.set()
        server.should_exit = True
        thread.join()
        listening.close()
        studio.workbench.close()

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
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
REQUIRED = "LORAKEET_BROWSER"  # in the environment of CI: without a browser or axe-core the tests fail there


def lacking(what: str) -> None:
    """Skips the test with a word; fails it where a browser is required."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{what}, and {REQUIRED} requires it")
    pytest.skip(what)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window. Skips with a word where there is none, or fails."""
    if find_spec("playwright") is None:
        lacking("playwright, of the extra lorakeet[test], is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        lacking(f"no Chromium ({', '.join(NAMES)}) is installed; on Debian: apt-get install chromium")
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        try:
            yield browser
        finally:
            browser.close()


def axe_core() -> str:
    """The script of axe-core, which checks a page for accessibility; empty where it is not installed, unless it is required."""
    if find_spec("axe_playwright_python") is not None:
        return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    if os.environ.get(REQUIRED):
        lacking("axe-playwright-python, of the extra lorakeet[test], is not installed")
    return ""


def serious(page: Any) -> list[tuple[str, str]]:
    """What axe-core finds on a page that is serious or worse; nothing without axe-core."""
    if not (script := axe_core()):
        return []
    page.evaluate(script)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((result) => result.violations)")
    return [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]


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

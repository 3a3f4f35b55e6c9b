"""`studio.start`: the command prints an address that opens the page, and Ctrl-C ends it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from lorakeet.cli.main import main
from lorakeet.studio.start import StudioServer


@pytest.mark.slow
def test_the_address_that_it_prints_opens_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorakeet", "studio", "--runs", str(tmp_path / "runs"), "--port", "0", "--json"]
    given = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        try:
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            with opener.open(address, timeout=10) as answer:
                assert b"Open the studio" in answer.read()
            with opener.open(address.partition("?")[0], timeout=10) as answer:
                assert b"quickstart" in answer.read() and "server" not in answer.headers
        finally:
            process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and json.loads(rest)["runs"] == str(tmp_path / "runs")


def test_the_last_studio_to_be_closed_ends_the_model_that_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr("lorakeet.studio.start.close_trial", lambda queue: closed.append(1))
    monkeypatch.setattr(StudioServer, "run", lambda server, sockets: sockets[0].close())
    words = ["studio", "--runs", str(tmp_path / "runs"), "--port", "0"]
    assert main(words) == 0 and closed == [1]
    with (tmp_path / "runs" / ".studio" / "open").open("rb") as other:  # as a second studio has it
        fcntl.flock(other, fcntl.LOCK_SH)
        assert main(words) == 0 and closed == [1]


def test_what_cannot_be_opened_is_refused_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["studio", "--runs", str(tmp_path / "file"), "--folder", str(tmp_path / "gone")]) == 2
    said = capsys.readouterr().err
    assert "is a file; expected a folder" in said and "is no folder; expected one with models or rows" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        capsys.readouterr()
        assert main(["studio", "--runs", str(tmp_path / "runs"), "--port", str(port), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["error"]
    assert (found["code"], found["values"]) == ("port-in-use", {"host": "127.0.0.1", "port": port})
    assert found["remedies"][0]["setting"] == "port" and not (tmp_path / "runs").exists()

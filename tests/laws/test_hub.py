"""A model by its hub id: the real huggingface_hub against a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tiny.family_columns import saved

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, sys
from lorakeet.errors import LorakeetError
from lorakeet.models.servable import require_served
from lorakeet.models.text.load import ReadBefore, load_text_model
from lorakeet.models.spec import ModelSpec

for name in sys.argv[1:]:
    serve, _, name = name.rpartition(" ")
    path, _, revision = name.partition("@")
    said, spec = [], ModelSpec(path=path, revision=revision or None, dtype="float32")
    try:
        before = require_served(spec, said.append) if serve else ReadBefore()
        text = load_text_model(spec, say=said.append, before=before)
        answer = {"files": sorted(file.name for file in text.source.iterdir()), "source": str(text.source)}
    except LorakeetError as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({**answer, "said": said}))
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs: /api/models/ID/revision/REV and /ID/resolve/REV/FILE."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        self.asked.append(f"{self.command} {path}")
        if "/gated" in path:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}, body=body)
        if "plants/tiny" not in path:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body=body)
        if not any(f"/{known}" in f"{path}/" for known in ("main/", COMMIT, "tiny/")) or "/v9" in path:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"}, body=body)
        if path.startswith("/api/models/"):
            return self.send(200, self.listing(tree="/tree/" in path), {"Content-Type": "application/json"}, body=body)
        file = self.folder / path.rpartition("/")[2]
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
        content = file.read_bytes()
        return self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, body=body)

    def listing(self, *, tree: bool) -> bytes:
        files = sorted(self.folder.iterdir())
        if tree:
            return json.dumps([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]).encode()
        return json.dumps({"id": "plants/tiny", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}).encode()

    def send(self, code: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def shelved(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub that has the files of `folder`: its address, and what it is asked for."""
    handler = type("Shelf", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tiny_llama_folder: Path, tmp_path: Path) -> Iterator[str]:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for file in tiny_llama_folder.iterdir():
        (shelf / file.name).write_bytes(file.read_bytes())
    (shelf / "pytorch_model.bin").write_bytes(b"a pickle, which is never fetched")
    with shelved(shelf) as (url, _):
        yield url


def fetched(hub: str, cache: Path, *names: str, offline: bool = False) -> list[dict[str, Any]]:
    """What a fresh process gets: huggingface_hub reads where the hub is when it is imported. A name may end in @revision."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    client = [sys.executable, "-c", CLIENT, *names]
    ended = subprocess.run(client, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.slow
def test_what_the_hub_refuses_is_said(hub: str, tmp_path: Path) -> None:
    unknown, gated, revision = fetched(hub, tmp_path / "cache", "plants/tinny", "plants/gated", "plants/tiny@v9")
    assert "ConfigError: model.path 'plants/tinny' is no file or folder here, and the hub has no model of" in unknown["error"]
    assert "EnvironmentProblem: The hub lets only approved users fetch 'plants/gated'; ask there, then" in gated["error"]
    assert revision["error"] == "ConfigError: The hub has no revision 'v9' of 'plants/tiny'; check model.revision."


@pytest.mark.slow
def test_a_server_fetches_no_weights_of_a_model_that_it_refuses(tmp_path: Path) -> None:
    with shelved(saved("jamba", tmp_path)) as (url, asked):
        (refused,) = fetched(url, tmp_path / "cache", "serve plants/tiny")
        fetched_files = {line.rpartition("/")[2] for line in asked if line.startswith("GET") and "/resolve/" in line}
    assert refused["error"].startswith("ConfigError: plants/tiny is a 'jamba' model, which cannot be served here: its JambaMamba")
    assert refused["said"] == ["Fetching the config.json of plants/tiny from the model hub."]
    assert fetched_files == {"config.json"}


@pytest.mark.slow
def test_a_model_is_fetched_once_and_then_needs_no_network(hub: str, tmp_path: Path) -> None:
    """The check before serving and a plan leave config.json alone in the cache; the rest is fetched then."""
    (first,) = fetched(hub, tmp_path / "cache", "serve plants/tiny")
    assert "error" not in first, first
    assert first["said"][:2] == [
        "Fetching the config.json of plants/tiny from the model hub.", "Fetching plants/tiny from the model hub.",
    ]  # fmt: skip
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first["files"])
    assert "pytorch_model.bin" not in first["files"] and COMMIT in first["source"]
    (again,) = fetched("http://127.0.0.1:9", tmp_path / "cache", "serve plants/tiny", offline=True)
    assert (
        again["files"] == first["files"]
        and again["source"] == first["source"]
        and not any("Fetching" in line for line in again["said"])
    )

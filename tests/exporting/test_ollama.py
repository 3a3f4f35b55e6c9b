"""Export to Ollama: Modelfile and request, and pushing to a strict server made from Ollama's documentation."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.exporting.ollama import OllamaModel, describe_template, push, require_address
from tiny.models import tiny_tokenizer


def test_the_modelfile_of_a_known_family() -> None:
    said: list[str] = []
    model = describe_template(tiny_tokenizer(), system="Be brief.", adapter=True, say=said.append)
    assert not said and model.family == "ChatML"
    lines = model.modelfile().splitlines()
    assert lines[:2] == ["FROM ./model.gguf", "ADAPTER ./adapter.gguf"]
    assert lines[2].startswith('TEMPLATE """{{- range .Messages }}')
    assert 'SYSTEM """Be brief."""' in lines and 'PARAMETER stop """<|im_end|>"""' in lines
    body = model.request("m", {"model.gguf": "sha256:1", "adapter.gguf": "sha256:2"})
    assert body["files"] == {"model.gguf": "sha256:1"} and body["adapters"] == {"adapter.gguf": "sha256:2"}
    assert (body["template"], body["system"]) == (model.template, "Be brief.")
    assert body["parameters"] == {"stop": list(model.stops)}


def test_an_unknown_template_is_said_and_left_to_the_file() -> None:
    tokenizer, said = tiny_tokenizer(), []
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    model = describe_template(tokenizer, system="", adapter=False, say=said.append)
    assert len(said) == 1 and "no TEMPLATE" in said[0]
    assert model.modelfile() == 'FROM ./model.gguf\nPARAMETER stop """<|im_end|>"""\n'


def test_three_quotation_marks_are_refused() -> None:
    with pytest.raises(ConfigError, match="three quotation marks"):
        OllamaModel(system='say """').modelfile()


KEYS = {"model", "from", "files", "adapters", "template", "license", "system", "parameters", "messages", "stream", "quantize"}


class Ollama(BaseHTTPRequestHandler):
    """HEAD and POST of blobs, and POST of /api/create, as documented; everything else is refused."""

    blobs: dict[str, bytes]
    models: dict[str, Any]
    fail: str

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path.rpartition("/")[2] in self.blobs else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/blobs/sha256:"):
            digest = self.path.rpartition("/")[2]
            right = digest == f"sha256:{hashlib.sha256(body).hexdigest()}"
            if right:
                self.blobs[digest] = body
            self._say(201 if right else 400, b"" if right else b'{"error":"digest mismatch"}')
        elif self.path == "/api/create":
            self._create(json.loads(body))
        else:
            self._say(404, b"404 page not found")

    def _create(self, asked: dict[str, Any]) -> None:
        files = {**asked.get("files", {}), **asked.get("adapters", {})}
        if set(asked) - KEYS or not asked.get("model") or not files or set(files.values()) - set(self.blobs):
            self._say(400, b'{"error":"invalid request"}')
        elif self.fail:
            self._say(200, b'{"status":"parsing GGUF"}\n' + self.fail.encode() + b"\n")
        else:
            self.models[asked["model"]] = asked
            self._say(200, b'{"status":"parsing GGUF"}\n{"status":"writing manifest"}\n{"status":"success"}\n')

    def _say(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, Any]]:
    handler = type("Handler", (Ollama,), {"blobs": {}, "models": {}, "fail": ""})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", handler
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(3_000_000))
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF small")
    return tmp_path


MODEL = OllamaModel(adapter="adapter.gguf", template="{{ .Prompt }}", stops=("<end>",))


def test_files_go_once_and_the_model_is_made_of_them(server: tuple[str, Any], folder: Path) -> None:
    host, handler = server
    said: list[str] = []
    sent: list[tuple[str, int, int]] = []
    push(folder, MODEL, "mine", host=host, say=said.append, on_progress=lambda *seen: sent.append(seen))
    assert {len(blob) for blob in handler.blobs.values()} == {3_000_004, 10}
    assert handler.models["mine"]["template"] == "{{ .Prompt }}" and handler.models["mine"]["stream"] is True
    assert said[-1] == "Ollama: success" and ("model.gguf", 3_000_004, 3_000_004) in sent and len(sent) > 3
    push(folder, MODEL, "again", host=host, say=said.append)
    assert f"model.gguf is on {host} already." in said and "again" in handler.models


@pytest.mark.parametrize(
    ("fail", "words"), [('{"error":"unsupported architecture"}', "unsupported architecture"), ("", ""), ("not json", "not json")]
)
def test_what_the_server_says_is_passed_on(server: tuple[str, Any], folder: Path, fail: str, words: str) -> None:
    host, handler = server
    handler.fail = fail or '{"status":"half way"}'
    with pytest.raises(EnvironmentProblem, match=words or r"ended without success \(last word: 'half way'\)"):
        push(folder, MODEL, "mine", host=host, say=lambda _: None)


def test_a_server_that_refuses_or_is_not_there(server: tuple[str, Any], folder: Path) -> None:
    host, _ = server
    with pytest.raises(EnvironmentProblem, match="refused making the model: 400 invalid request"):
        push(folder, MODEL, "", host=host, say=lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"cannot be reached .*ollama serve"):
        push(folder, MODEL, "m", host="http://127.0.0.1:9", say=lambda _: None)
    with pytest.raises(ConfigError, match="expected an address"):
        push(folder, MODEL, "m", host="localhost:11434", say=lambda _: None)
    with pytest.raises(ConfigError, match="expected an address"):
        require_address("localhost:11434")

"""`workflows.server_artefact`: a served model is compared by what it writes, over llama.cpp's API and over OpenAI's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import EnvironmentProblem, VerificationFailed
from lorakeet.export.llama_cpp import LlamaCpp
from lorakeet.export.tolerances import F16
from lorakeet.models.load import load_tokenizer
from lorakeet.workflows.convert import convert
from lorakeet.workflows.opened import open_adapter
from lorakeet.workflows.server_artefact import Server, _label
from lorakeet.workflows.verify import verify
from tiny.exports import write_model
from tiny.runs import quiet


class Served(BaseHTTPRequestHandler):
    """The parts of both APIs that are asked for, answered by llama.cpp itself; `native` offers its own API too."""

    engine: LlamaCpp
    tokenizer: Any
    native: bool
    lock = threading.Lock()

    def do_GET(self) -> None:
        known = {"/v1/models": {"data": [{"id": "tiny"}]}, **({"/props": {"n_ctx": 512}} if self.native else {})}
        self._say(known.get(self.path))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self._say(self._answer(asked))

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        if self.path == "/v1/completions":
            steps = self._write(asked["prompt"], asked["max_tokens"])
            assert asked["model"] == "tiny" and asked["temperature"] == 0
            logprobs = {"tokens": [step["token"] for step in steps], "token_logprobs": [step["logprob"] for step in steps]}
            return {"choices": [{"text": "", "logprobs": logprobs if asked.get("logprobs") else None}]}
        if not self.native:
            return None
        if self.path == "/tokenize":
            return {"tokens": self.engine.tokenise(asked["content"])}
        if self.path == "/apply-template":
            text = self.tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
            return {"prompt": text}
        if self.path == "/completion":
            return {"completion_probabilities": self._write(asked["prompt"], asked["n_predict"])}
        return None

    def _write(self, prompt: list[int], tokens: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        ids = list(prompt)
        for _ in range(tokens):
            after = self.engine.logits(ids)[-1].log_softmax(-1)
            ids.append(int(after.argmax()))
            found.append({"id": ids[-1], "token": self.tokenizer.decode(ids[-1:]), "logprob": float(after.max())})
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return found

    def _say(self, body: dict[str, Any] | None) -> None:
        data = json.dumps(body or {"error": "not found"}).encode()
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(params=[True, False], ids=["llama.cpp", "OpenAI"])
def serve(request: Any, finished: Any) -> Iterator[Any]:
    """`serve(file)` starts a server over a GGUF file and gives its address."""
    started: list[Any] = []

    def start(file: Path) -> str:
        engine = LlamaCpp(file, context=512)
        tokenizer = load_tokenizer(finished.model)
        handler = type("Handler", (Served,), {"engine": engine, "tokenizer": tokenizer, "native": request.param})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        started.append((server, thread, engine))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread, engine in started:
        server.shutdown()
        thread.join()
        server.server_close()
        engine.close()


def test_the_right_model_passes_and_the_base_does_not(finished: Any, serve: Any, tmp_path: Path) -> None:
    run = shutil.copytree(finished.path, tmp_path / "run")  # whose certificate will hold a failed check
    adapter = open_adapter(run).adapter
    right = serve(write_model(finished.model, adapter, tmp_path / "right.gguf"))
    found: Any = verify(str(run), against=(right,), rows=2, console=quiet())
    names = [check.name.rpartition(": ")[2] for check in found.certificate.checks]
    assert names in (["prompt ids", "greedy text", "answers"], ["greedy text", "answers"])
    answers = found.certificate.checks[-1]
    assert answers.measured == {"different_answers": 0} and answers.n == 2
    assert answers.estimates["accuracy_live"] == answers.estimates["accuracy_there"]
    wrong = serve(write_model(finished.model, None, tmp_path / "wrong.gguf"))
    with pytest.raises(VerificationFailed, match="first diverging token is number 0"):
        verify(str(run), against=(wrong,), rows=2, console=quiet())


LLAMA_SERVER = """
import json, sys
import xllamacpp
given = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = given["model"]
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in given["adapters"]]
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(model: Path, *adapters: Path) -> Iterator[str]:
    """The address of llama.cpp's own server, which is what Ollama starts."""
    given = json.dumps({"model": str(model), "adapters": [str(path) for path in adapters]})
    command = [sys.executable, "-c", LLAMA_SERVER, given]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[1] for line in iter(process.stdout.readline, "") if line.startswith("listening"))
        finally:
            process.kill()


def test_a_real_llama_server_writes_what_the_live_adapter_writes_merged_or_not(finished: Any, tmp_path: Path) -> None:
    run = shutil.copytree(finished.path, tmp_path / "run")
    adapter = open_adapter(run).adapter
    merged, base = (write_model(finished.model, held, tmp_path / name) for held, name in ((adapter, "m.gguf"), (None, "b.gguf")))
    convert(run, tmp_path / "a.gguf", to="gguf", base=finished.model, console=quiet())
    for model, adapters in ((merged, ()), (base, (tmp_path / "a.gguf",))):
        with llama_server(model, *adapters) as url:
            found: Any = verify(str(run), against=(url,), rows=2, console=quiet())
            names = [check.name.rpartition(": ")[2] for check in found.certificate.checks]
            assert names == ["prompt ids", "greedy text", "answers"]
    with llama_server(base) as url, pytest.raises(VerificationFailed, match="first diverging token"):
        verify(str(run), against=(url,), rows=2, console=quiet())


def test_the_label_that_was_written_is_the_longest_that_fits() -> None:
    labels = ["bad", "bad taste", "good"]
    found = [_label(labels, text) for text in (" bad taste.", "bad", "good\n", "goo", "")]
    assert found == [1, 0, 2, -1, -1]


def test_nothing_there_is_said() -> None:
    with pytest.raises(EnvironmentProblem, match="gives no answer that can be used"):
        Server("http://127.0.0.1:9", F16)

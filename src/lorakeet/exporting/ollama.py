"""A model for Ollama: a folder with the Modelfile beside the GGUF files, or the same settings sent to a server.

    FROM ./model.gguf · ADAPTER ./adapter.gguf · TEMPLATE in Go's syntax · SYSTEM · PARAMETER stop

Only GGUF files are used. Ollama also imports safetensors adapters, but permutes the wrong factor of Llama's q and k.
Modelfile syntax: https://github.com/ollama/ollama/blob/main/docs/modelfile.md. A server gets each file once by its SHA-256, then
a request to create the model (https://github.com/ollama/ollama/blob/main/docs/api.md):

    HEAD /api/blobs/sha256:…   200 there, 404 not     POST /api/blobs/sha256:…   201 taken, 400 another digest
    POST /api/create           a stream of {"status": …} lines up to {"status": "success"}, or {"error": …}
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorakeet.disk import open_buffered
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.exporting.ollama_templates import recognise
from lorakeet.formats.files.digest import sha256_of

MODEL, ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
DEFAULT_HOST = "http://127.0.0.1:11434"
_PIECE = 1 << 20
_TIMEOUT = 600  # seconds of silence; making layers of a large model takes a while
Progress = Callable[[str, int, int], None]  # file name, bytes sent, bytes in all


@dataclass(frozen=True)
class OllamaModel:
    """The settings of a model in Ollama; `model` and `adapter` are names of GGUF files in the folder."""

    model: str = MODEL
    adapter: str = ""
    template: str = ""  # empty: Ollama reads the chat template inside the GGUF file
    system: str = ""
    stops: tuple[str, ...] = ()
    family: str = field(default="", compare=False)

    def modelfile(self) -> str:
        """The text of the Modelfile."""
        lines = [f"FROM ./{self.model}"]
        if self.adapter:
            lines.append(f"ADAPTER ./{self.adapter}")
        if self.template:
            lines.append(f"TEMPLATE {_quoted('TEMPLATE', self.template)}")
        if self.system:
            lines.append(f"SYSTEM {_quoted('SYSTEM', self.system)}")
        lines += [f"PARAMETER stop {_quoted('PARAMETER stop', stop)}" for stop in self.stops]
        return "\n".join(lines) + "\n"

    def request(self, name: str, digests: dict[str, str]) -> dict[str, Any]:
        """The body of POST /api/create for a model called `name`; `digests` are "sha256:…" by file name."""
        body: dict[str, Any] = {"model": name, "files": {self.model: digests[self.model]}, "stream": True}
        if self.adapter:
            body["adapters"] = {self.adapter: digests[self.adapter]}
        if self.template:
            body["template"] = self.template
        if self.system:
            body["system"] = self.system
        if self.stops:
            body["parameters"] = {"stop": list(self.stops)}
        return body


def describe_template(tokenizer: Any, *, system: str, adapter: bool, say: Callable[[str], None]) -> OllamaModel:
    """The settings of a model with this tokenizer; `system`: the run's system prompt.

    `say` gets a note if the chat template is of no known family: Ollama then uses the one in the GGUF file.
    """
    adapter_file = ADAPTER if adapter else ""
    found = recognise(tokenizer)
    stops = (str(tokenizer.eos_token),) if tokenizer.eos_token else ()
    if found is None and tokenizer.chat_template:
        say(
            "The chat template is of no family that is known here in Go's syntax, so the Modelfile has no TEMPLATE: Ollama uses "
            "the template in the GGUF file if its version can. Compare a reply before you rely on it."
        )
    if found is None:
        return OllamaModel(adapter=adapter_file, system=system, stops=stops)
    if system and not found.knows_system:
        say(f"The {found.template.family} template refuses a system prompt; in Ollama it will be put before the first question.")
    marks = dict.fromkeys((*found.template.stops, *stops))
    return OllamaModel(
        adapter=adapter_file,
        template=found.template.text,
        system=system or found.default_system,
        stops=tuple(marks),
        family=found.template.family,
    )


def _quoted(what: str, text: str) -> str:
    if '"""' in text:
        raise ConfigError(f"{what} of the Modelfile would have three quotation marks in a row, which end it: {text[:80]!r}.")
    return f'"""{text}"""'


def require_address(host: str) -> None:
    """Raises ConfigError unless `host` is an http address; nothing is sent."""
    _PushServer(host)


def push(
    folder: Path,
    model: OllamaModel,
    name: str,
    *,
    host: str = DEFAULT_HOST,
    say: Callable[[str], None],
    on_progress: Progress | None = None,
) -> None:
    """Creates the model `name` on the server at `host` from the files in `folder`.

    ConfigError for a host that is no http address; EnvironmentProblem if the server cannot be reached or refuses.
    """
    server = _PushServer(host)
    digests: dict[str, str] = {}
    for file in filter(None, (model.model, model.adapter)):
        path = folder / file
        digests[file] = f"sha256:{sha256_of(path)}"
        if server.has(digests[file]):
            say(f"{file} is on {host} already.")
        else:
            server.send(digests[file], path, on_progress)
            say(f"{file} sent to {host}.")
    for status in server.create(model.request(name, digests)):
        say(f"Ollama: {status}")


class _PushServer:
    def __init__(self, host: str) -> None:
        parts = urlsplit(host)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--host is '{host}'; expected an address such as {DEFAULT_HOST}.")
        self.host, self.parts = host, parts

    def _request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[http.client.HTTPConnection, Any]:
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self.parts.hostname), self.parts.port, timeout=_TIMEOUT)
        try:
            connection.request(method, self.parts.path.rstrip("/") + path, body=body, headers=headers)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EnvironmentProblem(
                f"Ollama at {self.host} cannot be reached ({error or type(error).__name__}). Start it (ollama serve), or give "
                "its address with --host."
            ) from error

    def has(self, digest: str) -> bool:
        connection, response = self._request("HEAD", f"/api/blobs/{digest}")
        with closing(connection):
            if response.status not in (200, 404):
                raise self._refusal("looking for a file", response)
            return bool(response.status == 200)

    def send(self, digest: str, path: Path, on_progress: Progress | None) -> None:
        size = path.stat().st_size
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        connection, response = self._request("POST", f"/api/blobs/{digest}", _pieces(path, size, on_progress), **headers)
        with closing(connection):
            if response.status != 201:
                raise self._refusal(f"taking {path.name}", response)

    def create(self, body: dict[str, Any]) -> Iterator[str]:
        data = json.dumps(body, ensure_ascii=False).encode()
        connection, response = self._request("POST", "/api/create", data, **{"Content-Type": "application/json"})
        with closing(connection):
            if response.status != 200:
                raise self._refusal("making the model", response)
            status = ""
            for line in response:
                if not line.strip():
                    continue
                said = _parsed(line)
                if "error" in said:
                    raise EnvironmentProblem(f"Ollama at {self.host} could not make '{body['model']}': {said['error']}.")
                status = str(said.get("status", ""))
                yield status
            if status != "success":
                raise EnvironmentProblem(
                    f"Ollama at {self.host} ended without success (last word: '{status}'); see its log, then push again."
                )

    def _refusal(self, what: str, response: Any) -> EnvironmentProblem:
        said = response.read(2000).decode("utf-8", "replace").strip()
        reason = _parsed(said.encode()).get("error", said) if said else response.reason
        return EnvironmentProblem(f"Ollama at {self.host} refused {what}: {response.status} {reason}.")


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {"error": line.decode("utf-8", "replace").strip()}
    return found if isinstance(found, dict) else {"error": str(found)}


def _pieces(path: Path, size: int, on_progress: Progress | None) -> Iterator[bytes]:
    sent = 0
    with open_buffered(path) as file:
        while piece := file.read(_PIECE):
            sent += len(piece)
            yield piece
            if on_progress is not None:
                on_progress(path.name, sent, size)


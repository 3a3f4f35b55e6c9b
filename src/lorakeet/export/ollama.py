"""A model folder for Ollama: the Modelfile beside the GGUF files, and the same settings for Ollama's API.

    FROM ./model.gguf · ADAPTER ./adapter.gguf · TEMPLATE in Go's syntax · SYSTEM · PARAMETER stop

Only GGUF files are used. Ollama also imports safetensors adapters, but permutes the wrong factor of Llama's q and k.
Modelfile syntax: https://github.com/ollama/ollama/blob/main/docs/modelfile.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.export.ollama_templates import recognise

MODEL, ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"


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

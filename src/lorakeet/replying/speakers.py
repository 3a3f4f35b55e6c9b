"""Who answers in a chat: a model of this process with its adapters, or a server with OpenAI's API."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any, Protocol

from lorakeet.core.adapter import Adapter
from lorakeet.data.spec import DataSpec
from lorakeet.errors import EnvironmentProblem, nearest
from lorakeet.replying.texts import TextSource
from lorakeet.runs.server_answer import answer_lines, open_answer, read_answer, refusal_of
from lorakeet.serve.model_names import UnknownModel, parse_model
from lorakeet.serve.sampling import Sampling

Messages = Sequence[Mapping[str, str]]
BASE = "base"


class Speaker(Protocol):
    """Who answers. `names` are the adapters that can be chosen; a choice is one of them, "base", or a mix a*0.7+b*0.3."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def check(self, choice: str) -> None:
        """Raises LorakeetError for a choice that cannot be made."""

    def reply(self, messages: Messages, choice: str, sampling: Sampling) -> Iterator[str]:
        """The reply, piece by piece."""


@dataclass(frozen=True)
class LocalSpeaker:
    """A model in this process. `data` are the settings by which training wrote prompts, by adapter."""

    source: TextSource
    adapters: Mapping[str, Adapter]
    data: Mapping[str, DataSpec]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def check(self, choice: str) -> None:
        _weights(choice, self.names)

    def reply(self, messages: Messages, choice: str, sampling: Sampling) -> Iterator[str]:
        weights = _weights(choice, self.names)
        mix = tuple((self.adapters[name], weight) for name, weight in weights.items())
        first = next(iter(weights or self.data), "")
        settings = self.data.get(first, DataSpec())
        ids = self.source.ids([dict(message) for message in messages], replace(settings, system=None), raw=False)
        return self.source.pieces(ids, mix, sampling)


@dataclass(frozen=True)
class ServerSpeaker:
    """A server at `url`, whose models are `base` and the adapters `names`."""

    url: str
    base: str
    names: tuple[str, ...]

    @classmethod
    def at(cls, address: str) -> tuple[ServerSpeaker, str]:
        """The server of URL or URL#NAME, and the model to begin with. Raises EnvironmentProblem where it does not answer."""
        url, _, name = address.partition("#")
        url = url.rstrip("/").removesuffix("/v1")
        with _opened(f"{url}/v1/models", None) as response, _readable(url):
            listed = [str(model.get("id")) for model in json.loads(read_answer(response)).get("data", ())]
        if not listed:
            raise EnvironmentProblem(f"{url}/v1/models lists no model. Start the server with one.")
        if name and name not in listed:
            raise UnknownModel(f"{url} has no model '{name}'; it has {', '.join(listed)}.{nearest(name, listed)}")
        return cls(url, listed[0], tuple(listed[1:])), name if name and name != listed[0] else BASE

    def check(self, choice: str) -> None:
        _weights(choice, self.names)

    def reply(self, messages: Messages, choice: str, sampling: Sampling) -> Iterator[str]:
        self.check(choice)
        body = {
            "model": self.base if choice == BASE else choice, "messages": list(messages), "stream": True,
            "max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "seed": sampling.seed,
        }  # fmt: skip
        with _opened(f"{self.url}/v1/chat/completions", body) as response, _readable(self.url):
            for line in answer_lines(response):
                text = line.decode("utf-8").strip()
                if not text.startswith("data:") or text == "data: [DONE]":
                    continue
                event = json.loads(text[5:])
                if event.get("error"):
                    raise EnvironmentProblem(f"{self.url} ended the reply: {str(event['error'])[:500]}")
                for part in event.get("choices") or ():
                    if piece := (part.get("delta") or {}).get("content"):
                        yield str(piece)


def _weights(choice: str, names: Collection[str]) -> dict[str, float]:
    try:
        return parse_model(choice, base=(BASE,), known=names)
    except UnknownModel:
        known = ", ".join((*names, BASE))
        raise UnknownModel(f"There is no adapter '{choice}'; there are {known}.{nearest(choice, names)}") from None


@contextmanager
def _readable(url: str) -> Iterator[None]:
    """A context in which an answer that ends early, or is no JSON, becomes an EnvironmentProblem."""
    try:
        yield
    except (HTTPException, OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"[:300]
        raise EnvironmentProblem(f"{url} gave an answer that cannot be read ({said}). Correct the address, or retry.") from error


def _opened(url: str, body: Mapping[str, Any] | None) -> Any:
    """The open answer of a server. Raises EnvironmentProblem with what it said."""
    try:
        return open_answer(url, body)
    except urllib.error.HTTPError as error:
        raise EnvironmentProblem(f"{url} refuses {refusal_of(error)}") from error
    except (urllib.error.URLError, OSError, ValueError, HTTPException) as error:
        raise EnvironmentProblem(f"{url} gives no answer ({error}). Start the server, or correct the address.") from error

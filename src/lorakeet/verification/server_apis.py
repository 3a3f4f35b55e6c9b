"""What served models tell over HTTP, API by API: prompts as token ids, and written tokens with their log-probabilities.

                          ids of a prompt             else how many       written tokens    likeliest tokens
    llama.cpp             /tokenize, /apply-template                      by id             n_probs
    vLLM                  /tokenize                   usage               by id             logprobs, prompt_logprobs
    OpenAI, lorakeet      /tokenize where there is    usage               by their text     logprobs
    SGLang                /tokenize                   usage               by id             /generate, of prompts too
    Ollama                                            prompt_eval_count   by their text     top_logprobs, since 0.12.11

Ollama takes no token ids, so it writes after conversations alone. Sources: each project's own description of its HTTP API.
"""

from __future__ import annotations

import json
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from http.client import HTTPException
from typing import Any, TypeVar, cast

from lorakeet.errors import ConfigError, EnvironmentProblem, one_message
from lorakeet.runs.server_answer import CallRefused, called_again, open_answer, read_answer, refusal_of
from lorakeet.verification.artefact import Messages

TOP = 10  # likeliest tokens that are requested; vLLM reports at most 20, OpenAI 20
_FEWER = (TOP, 5, 1, 0)  # where a server refuses that many; 0: none
_TOO_MANY = (400, 422)  # what a server answers to more likeliest tokens than it reports
_NO_TIME = (429, 503)
PAUSES = (1.0, 3.0, 9.0)  # seconds
_TRIES = 2  # calls that a number of likeliest tokens is requested in, before it counts as refused
_BY_ID = "token_id:"  # how vLLM writes a token if ids are requested
_SHOWN = 8
_ROUNDED = 1e-3  # above 0


@dataclass(frozen=True)
class Token:
    """A token as the server reports it: its text, and its id and log-probability if they are reported."""

    text: str
    number: int | None = None
    logprob: float | None = None

    @property
    def by_id(self) -> bool:
        """Whether its id stands in place of its text."""
        return self.text.startswith(_BY_ID)


@dataclass(frozen=True)
class Step:
    """A written token, and the likeliest ones in its place; none if they are not reported."""

    token: Token
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Written:
    """A written text, whole and token by token; no steps where the server tells the text alone."""

    text: str
    steps: tuple[Step, ...] = ()


def ask(
    url: str, path: str, body: Mapping[str, Any] | None = None, *, key: str = "", pause: Callable[[float], object] = time.sleep
) -> dict[str, Any]:
    """The JSON object that a server answers; one that has no time (429, 503) is queried again after each of PAUSES.

    CallRefused where it answers with another error, EnvironmentProblem where with nothing, or has no time still.
    """
    try:
        return called_again(partial(_answer, url, path, body, key), _NO_TIME, PAUSES, pause)
    except CallRefused as error:
        if error.status in _NO_TIME:
            raise EnvironmentProblem(str(error), code=error.code, values=error.values) from error
        raise


def _answer(url: str, path: str, body: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    try:
        found = json.loads(_read(url, path, body, key))
    except (ValueError, RecursionError) as error:
        raise _unusable(url + path, error) from error
    if not isinstance(found, dict):
        raise EnvironmentProblem(f"{url}{path} answers {str(found)[:80]!r}; expected a JSON object.")
    return found


def _read(url: str, path: str, body: Mapping[str, Any] | None, key: str) -> bytes:
    try:
        with open_answer(url + path, body, key=key) as response:
            return read_answer(response)
    except urllib.error.HTTPError as error:
        raise CallRefused(f"{url}{path} refuses {refusal_of(error)} Correct --against, or the server.", error.code) from error
    except (urllib.error.URLError, OSError, ValueError, HTTPException) as error:
        raise _unusable(url + path, error) from error


def _unusable(place: str, error: Exception) -> EnvironmentProblem:
    said = f"{place} gives no answer that can be used ({error}). Start the server, or correct --against."
    return EnvironmentProblem(said, code="server-refused")


_Call = TypeVar("_Call", bound=Callable[..., Any])
_BROKEN = "Its API is another one than it seems, or it is broken: correct --against, or the server."


def understood(call: _Call) -> _Call:
    """Makes a call of an API the boundary of what a server answers: values of other kinds are one EnvironmentProblem."""

    @wraps(call)
    def bounded(api: Api, *given: Any) -> Any:
        with one_message(f"{api.url} gives an answer that cannot be used", _BROKEN, EnvironmentProblem):
            return call(api, *given)

    return cast(_Call, bounded)


class Api:
    """OpenAI's API, as lorakeet serve and most servers have it. None stands for what is not reported."""

    takes_ids = True
    loads = "/v1/load_lora_adapter"  # the call that loads an adapter; "" where all are given at the start

    def __init__(self, url: str, model: str, key: str = "") -> None:
        """`key` is sent with every call."""
        self.url, self.model, self.key = url, model, key
        self._most: tuple[int, ...] = _FEWER  # numbers of likeliest tokens that it may accept, the most first
        self._refused: Counter[int] = Counter()  # in how many calls each was refused, and fewer accepted

    @understood
    def serves_it(self) -> bool:
        """Whether the server lists the model."""
        return self.model in {str(one.get("id", "")) for one in self._ask("/v1/models").get("data") or ()}

    @understood
    def load(self, name: str, folder: str) -> Api:
        """Loads an adapter folder of PEFT's under another name, beside all others: the API of that one."""
        _read(self.url, self.loads, {"lora_name": name, "lora_path": folder}, self.key)
        return type(self)(self.url, name, self.key)

    @understood
    def unload(self) -> None:
        """Unloads the adapter of this API."""
        _read(self.url, self.loads.replace("/load_", "/unload_"), {"lora_name": self.model}, self.key)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return ask(self.url, path, body, key=self.key)

    def _with_likeliest(self, call: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """What `call` answers to the largest number of likeliest tokens that the server does not refuse.

        A number is requested in _TRIES calls: one may be refused for another reason.
        """
        refused = list[int]()
        for count in self._most:
            try:
                found = call(count)
            except CallRefused as error:
                if error.status not in _TOO_MANY or count == self._most[-1]:
                    raise
                refused.append(count)
                continue
            self._refused.update(refused)
            self._most = tuple(one for one in self._most if self._refused[one] < _TRIES)
            return found
        raise ValueError("no number of likeliest tokens is left to request")

    @understood
    def about(self) -> str:
        """What the server says that it is."""
        return f"{self.model} by a server with OpenAI's API"

    @understood
    def number_format(self) -> str:
        """The number format that the server says it computes in, as it says it; "" if it does not."""
        listed = self._ask("/v1/models").get("data") or ()
        return next((str(one.get("dtype") or "") for one in listed if one.get("id") == self.model), "")

    @understood
    def tokenise(self, text: str) -> list[int] | None:
        """The ids of a raw text."""
        return self._tokens({"model": self.model, "prompt": text, "add_special_tokens": True})

    @understood
    def prompt(self, messages: Messages) -> list[int] | None:
        """The ids of a conversation through the server's chat template."""
        return self._tokens({"model": self.model, "messages": list(messages), "add_generation_prompt": True})

    @understood
    def prompt_length(self, messages: Messages) -> int | None:
        """How many tokens a conversation has there."""
        requested = {"model": self.model, "messages": list(messages), "max_tokens": 1, "temperature": 0}
        try:
            count = (self._ask("/v1/chat/completions", requested).get("usage") or {}).get("prompt_tokens")
        except CallRefused:
            return None
        return None if count is None else int(count)

    @understood
    def write(self, prompt: Sequence[int], tokens: int) -> Written:
        """The likeliest continuation of token ids."""
        requested = {"model": self.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, **self._more()}

        def call(top: int) -> dict[str, Any]:
            return self._ask("/v1/completions", {**requested, "logprobs": top} if top else requested)

        found = self._with_likeliest(call)["choices"][0]
        reported = found.get("logprobs") or {}
        written = list(zip(reported.get("tokens") or (), reported.get("token_logprobs") or (), strict=True))
        tops = reported.get("top_logprobs") or ()
        if len(tops) != len(written):  # nothing is beside any token if there is not one for each
            tops = [{}] * len(written)
        steps = (
            Step(_token(*pair), tuple(_token(*other) for other in (top or {}).items()))
            for pair, top in zip(written, tops, strict=True)
        )
        return Written(str(found.get("text", "")), tuple(steps))

    @understood
    def chat(self, messages: Messages, tokens: int) -> Written:
        """The likeliest answer in a conversation."""
        requested = {"model": self.model, "messages": list(messages), "max_tokens": tokens, "temperature": 0}

        def call(top: int) -> dict[str, Any]:
            likeliest = {"logprobs": True, "top_logprobs": top} if top else {}
            return self._ask("/v1/chat/completions", {**requested, **likeliest})

        found = self._with_likeliest(call)["choices"][0]
        return Written(str(found["message"]["content"]), _steps((found.get("logprobs") or {}).get("content") or ()))

    @understood
    def along(self, ids: Sequence[int]) -> dict[int, tuple[Token, ...]] | None:
        """The likeliest tokens after ids[: place + 1], for all places of a given text; vLLM reports them."""
        return None

    def _more(self) -> dict[str, Any]:
        """Fields of a completion that only this server knows."""
        return {}

    def _tokens(self, body: Mapping[str, Any]) -> list[int] | None:
        try:
            found = self._ask("/tokenize", body).get("tokens")
        except CallRefused:
            return None
        return None if found is None else [int(number) for number in found]


class VllmApi(Api):
    """vLLM: OpenAI's API, token ids in place of their texts, and log-probabilities along a prompt."""

    @understood
    def about(self) -> str:
        return f"{self.model} by vLLM {self._ask('/version').get('version', '')}"

    @understood
    def along(self, ids: Sequence[int]) -> dict[int, tuple[Token, ...]] | None:
        requested = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}

        def call(top: int) -> dict[str, Any]:
            return self._ask("/v1/completions", {**requested, "prompt_logprobs": top} if top else requested)

        found = self._with_likeliest(call)["choices"][0].get("prompt_logprobs")
        if not found:
            return None
        return {
            place - 1: tuple(
                Token(str(one.get("decoded_token") or ""), int(number), _logprob(one["logprob"]))
                for number, one in reported.items()
            )
            for place, reported in enumerate(found)
            if reported
        }

    def _more(self) -> dict[str, Any]:
        return {"return_tokens_as_token_ids": True}


class LlamaCppApi(Api):
    """llama-server's own API."""

    loads = ""

    @understood
    def serves_it(self) -> bool:
        return True  # it has one model, whatever it is called

    @understood
    def about(self) -> str:
        reported = self._ask("/props")
        return f"{reported.get('model_path') or 'a model'} by llama.cpp {reported.get('build_info') or ''}".strip()

    @understood
    def number_format(self) -> str:
        found = str(self._ask("/props").get("model_ftype") or "")
        return f"F16 (its keys and values; weights: {found})" if "F32" in found else found  # as llama-server keeps them

    @understood
    def tokenise(self, text: str) -> list[int] | None:
        return self._tokens({"content": text, "add_special": True, "parse_special": True})

    @understood
    def prompt(self, messages: Messages) -> list[int] | None:
        try:
            return self.tokenise(str(self._ask("/apply-template", {"messages": list(messages)})["prompt"]))
        except CallRefused:
            return None

    @understood
    def write(self, prompt: Sequence[int], tokens: int) -> Written:
        requested = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "n_probs": TOP, "cache_prompt": False}
        found = self._ask("/completion", requested)
        return Written(str(found.get("content", "")), _steps(found.get("completion_probabilities") or ()))


class SglangApi(Api):
    """SGLang's own API (0.5.23): log-probabilities as [log p, id, text], and adapters by `lora_path`."""

    loads = "/load_lora_adapter"

    @understood
    def about(self) -> str:
        return f"{self.model} by SGLang {self._ask('/server_info').get('version', '')}"

    @understood
    def number_format(self) -> str:
        reported = self._ask("/server_info")
        return str(reported.get("quantization") or reported.get("dtype") or "")

    @understood
    def write(self, prompt: Sequence[int], tokens: int) -> Written:
        found = self._generate(prompt, tokens, -1)
        meta = found["meta_info"]
        tops = meta.get("output_top_logprobs") or ()
        steps = (
            Step(_triple(one), tuple(map(_triple, top or ())))
            for one, top in zip(meta.get("output_token_logprobs") or (), tops, strict=True)
        )
        return Written(str(found["text"]), tuple(steps))

    @understood
    def along(self, ids: Sequence[int]) -> dict[int, tuple[Token, ...]] | None:
        found = self._generate(ids, 1, 0)["meta_info"].get("input_top_logprobs")
        return found and {place - 1: tuple(map(_triple, top)) for place, top in enumerate(found) if top}

    def _generate(self, ids: Sequence[int], tokens: int, start: int) -> dict[str, Any]:
        """Writes `tokens` after `ids`; log-probabilities begin with the token `start` of them, or (-1) after all."""
        requested = {"input_ids": list(ids), "sampling_params": {"max_new_tokens": tokens, "temperature": 0}}
        requested |= {"lora_path": self._adapter()} if self._adapter() else {}
        likeliest = {"return_logprob": True, "logprob_start_len": start, "return_text_in_logprobs": True}

        def call(top: int) -> dict[str, Any]:
            return self._ask("/generate", {**requested, **likeliest, "top_logprobs_num": top} if top else requested)

        return self._with_likeliest(call)

    def _adapter(self) -> str:
        """The model's name if it is an adapter: those have a parent among the models."""
        if self._loaded is None:
            listed = self._ask("/v1/models").get("data") or ()
            self._loaded = self.model if any(one.get("id") == self.model and one.get("parent") for one in listed) else ""
        return self._loaded

    _loaded: str | None = None


class OllamaApi(Api):
    """Ollama's own API, which goes through its template and takes no token ids."""

    takes_ids = False
    loads = ""

    @understood
    def serves_it(self) -> bool:
        names = {str(one.get("name", "")) for one in self._ask("/api/tags").get("models") or ()}
        return not names.isdisjoint({self.model, f"{self.model}:latest"})

    @understood
    def about(self) -> str:
        listed = self._ask("/api/tags").get("models") or ()
        names = self.model, f"{self.model}:latest"
        digest = next((str(one.get("digest", ""))[:12] for one in listed if one.get("name") in names), "")
        return f"{self.model}{f' ({digest})' if digest else ''} by Ollama {self._ask('/api/version').get('version', '')}"

    @understood
    def number_format(self) -> str:
        return str((self._ask("/api/show", {"model": self.model}).get("details") or {}).get("quantization_level") or "")

    @understood
    def tokenise(self, text: str) -> list[int] | None:
        return None

    @understood
    def prompt(self, messages: Messages) -> list[int] | None:
        return None

    @understood
    def prompt_length(self, messages: Messages) -> int | None:
        count = self._chat(messages, 1).get("prompt_eval_count")
        return None if count is None else int(count)

    def write(self, prompt: Sequence[int], tokens: int) -> Written:
        raise ValueError("Ollama takes no token ids")

    @understood
    def chat(self, messages: Messages, tokens: int) -> Written:
        found = self._chat(messages, tokens)
        return Written(str(found["message"]["content"]), _steps(found.get("logprobs") or ()))

    def _chat(self, messages: Messages, tokens: int) -> dict[str, Any]:
        options = {"temperature": 0, "num_predict": tokens, "repeat_penalty": 1.0}  # 1.1, its own, would write another text
        requested = {"model": self.model, "messages": list(messages), "stream": False, "options": options}
        return self._ask("/api/chat", {**requested, "logprobs": True, "top_logprobs": TOP})


def adapters_of(url: str, key: str = "") -> list[str]:
    """The names of all adapters that a server lists: its models that have a parent. EnvironmentProblem where nothing answers."""
    with one_message(f"{url} gives an answer that cannot be used", _BROKEN, EnvironmentProblem):
        listed = ask(url.rstrip("/").removesuffix("/v1"), "/v1/models", key=key).get("data") or ()
        return [str(one["id"]) for one in listed if one.get("parent")]


def find_api(url: str, model: str, key: str = "") -> Api:
    """The API of the server at `url`, asking for `model` with `key`; "" is the only model that it serves.

    EnvironmentProblem where nothing answers, ConfigError where several models do and none is named.
    """
    with one_message(f"{url} gives an answer that cannot be used", _BROKEN, EnvironmentProblem):
        return _found(url, model, key)


def _found(url: str, model: str, key: str) -> Api:
    if _answers(url, "/props", key):
        return LlamaCppApi(url, model, key)
    listed = ask(url, "/v1/models", key=key).get("data") or [{}]  # raises where nothing answers at all
    names = [str(one.get("id", "")) for one in listed]
    if not model and len(names) > 1:
        raise ConfigError(
            f"{url} serves {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}; say which of them is meant: "
            f"--against {url}#NAME."
        )
    model = model or names[0]
    if any(one.get("owned_by") == "lorakeet" for one in listed):
        return Api(url, model, key)
    kinds = {"/model_info": SglangApi, "/version": VllmApi, "/api/version": OllamaApi}
    return next((kind for path, kind in kinds.items() if _answers(url, path, key)), Api)(url, model, key)


def _answers(url: str, path: str, key: str) -> bool:
    try:
        ask(url, path, key=key)
    except EnvironmentProblem:
        return False
    return True


def _token(text: str, logprob: float | None) -> Token:
    named = text[len(_BY_ID) :] if text.startswith(_BY_ID) else ""
    return Token(text, int(named) if named.isdigit() else None, _logprob(logprob))


def _triple(one: Sequence[Any]) -> Token:
    """A token as SGLang reports it: [log-probability, id, text or null]."""
    return Token(str(one[2] or ""), int(one[1]), _logprob(one[0]))


def _steps(reported: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """Steps as llama.cpp, OpenAI's chats and Ollama tell them."""
    return tuple(Step(_entry(one), tuple(_entry(other) for other in one.get("top_logprobs") or ())) for one in reported)


def _entry(one: Mapping[str, Any]) -> Token:
    number, logprob = one.get("id"), one.get("logprob")
    return Token(str(one["token"]), None if number is None else int(number), _logprob(logprob))


def _logprob(reported: Any) -> float | None:
    """A log-probability; ValueError for what is none. It may be minus infinity, and a little above 0 by rounding."""
    if reported is None:
        return None
    value = float(reported)
    if not value <= _ROUNDED:
        raise ValueError(f"a log-probability is {value}; expected 0 or less")
    return value

"""OpenAI's /v1/chat/completions, /v1/completions and /v1/models (https://platform.openai.com/docs/api-reference).

And vLLM's /tokenize, with which `lorakeet verify` checks that prompts are tokenized as in training.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from lorakeet.data.tables import UnusableRow
from lorakeet.data.template import decoded
from lorakeet.data.tool_calls import message_extra
from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.serve.access import Caller
from lorakeet.serve.engine import Event
from lorakeet.serve.grammar import ANY_OBJECT
from lorakeet.serve.request_fields import Fields
from lorakeet.serve.routes.multiplex import collect_and_close, merge_events
from lorakeet.serve.routes.reply import CLIENT_GONE, HttpReply, Incoming, as_json
from lorakeet.serve.sampling import SampledToken, Sampling
from lorakeet.serve.service import Generation, Service
from lorakeet.serve.text_stream import token_bytes
from lorakeet.serve.tool_replies import calls_in, tools_of

_COMMON = {
    "model", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "logprobs", "lora",
    "response_format", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
}  # fmt: skip
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice"}
_COMPLETION = _COMMON | {"prompt"}
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
_NEUTRAL: dict[str, Any] = {
    "functions": [],
    "echo": False, "best_of": 1, "suffix": "", "modalities": ["text"],
}  # fmt: skip
_OF_MESSAGE = {  # ignored; clients send these back with a server's answers
    "refusal", "thinking", "reasoning", "reasoning_content", "annotations", "parsed", "id", "tool_name",
}  # fmt: skip
_NEUTRAL_OF_MESSAGE: dict[str, Any] = {"images": [], "function_call": {}, "audio": {}}
MOST_PROMPTS = 128  # in one request
_ROLES = ("system", "user", "assistant", "developer", "tool")


@dataclass(frozen=True)
class _ParsedRequest:
    """A parsed request."""

    model: str
    prompts: Sequence[tuple[int, ...]]
    sampling: Sampling
    n: int
    stream: bool
    usage: bool  # the stream ends with token counts
    chat: bool
    logprobs: bool  # reported
    schema: Mapping[str, Any] | None  # of JSON output
    tools: tuple[dict[str, Any], ...] = ()


async def chat_completions(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /v1/chat/completions."""
    fields = Fields(data)
    fields.refuse(_CHAT, _WITHOUT_EFFECT, _NEUTRAL)
    tell = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0) or 0
    if top and not tell:
        raise ConfigError("top_logprobs needs logprobs: true.")
    limit = fields.whole("max_completion_tokens", fields.whole("max_tokens"))
    tools = tools_of(fields)
    ids = await service.chat_ids(messages(fields), tools)
    parsed = _parsed(service, fields, [ids], limit, logprobs=top if tell else None, chat=True)
    parsed = replace(parsed, tools=tools)
    return await _answer(service, caller, request, parsed, fields)


async def completions(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /v1/completions; the prompt is a text, a list of token ids, or a list of these."""
    fields = Fields(data)
    fields.refuse(_COMPLETION, _WITHOUT_EFFECT, _NEUTRAL)
    given = fields.data.get("prompt")
    listed = isinstance(given, list) and any(isinstance(part, (str, list)) for part in given)
    several: list[Any] = list(given or ()) if listed else [given]
    if len(several) > MOST_PROMPTS:
        raise ConfigError(f"prompt is a list of {len(several)}; at most {MOST_PROMPTS} are taken at once.")
    prompts = [await _prompt(service, one) for one in several]
    limit = fields.whole("max_tokens", 16)
    parsed = _parsed(service, fields, prompts, limit, logprobs=fields.whole("logprobs"), chat=False)
    return await _answer(service, caller, request, parsed, fields)


async def _prompt(service: Service, given: Any) -> tuple[int, ...]:
    """The tokens of one prompt: a text or token ids."""
    if isinstance(given, list) and given and all(isinstance(part, int) and not isinstance(part, bool) for part in given):
        vocabulary = len(service.text.tokenizer)
        if not all(0 <= number < vocabulary for number in given):
            raise ConfigError(f"prompt holds a token id outside 0 … {vocabulary - 1}.")
        return tuple(given)
    if isinstance(given, list):
        raise ConfigError("prompt is a list of neither texts nor token ids; expected a text, token ids, or a list of these.")
    return await service.prompt_ids(Fields({"prompt": given}).text("prompt"))


async def tokenize(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /tokenize, as vLLM has it: the ids of a raw prompt or of a conversation, before anything is written."""
    fields = Fields(data)
    chat = "messages" in fields.data
    neutral = {"add_special_tokens": not chat, "add_generation_prompt": chat}
    fields.refuse({"model", "messages" if chat else "prompt"}, (), neutral)
    service.adapters_named(caller, fields.text("model"))
    caller.count()
    ids = await (service.chat_ids(messages(fields)) if chat else service.prompt_ids(fields.text("prompt")))
    return as_json({"count": len(ids), "max_model_len": service.engine.context, "tokens": list(ids)})


def messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages of a chat request, with tool calls and their results; text parts are joined. ConfigError for anything else."""
    given = fields.data.get("messages")
    if not isinstance(given, list) or not given:
        raise ConfigError("messages is missing or empty; expected a list of {role, content}.")
    found = []
    for number, entry in enumerate(given):
        message = Fields(entry, f"messages[{number}]")
        message.refuse({"role", "content", "tool_calls", "tool_call_id", "name"}, _OF_MESSAGE, _NEUTRAL_OF_MESSAGE)
        role, content = message.text("role"), message.data.get("content")
        if role not in _ROLES:
            raise ConfigError(f"role of messages[{number}] is {role!r}; expected one of {', '.join(_ROLES)}.")
        if isinstance(content, list):
            parts = [Fields(part, f"a part of messages[{number}]") for part in content]
            if any(part.text("type") != "text" for part in parts):
                raise ConfigError(f"messages[{number}] has a part that is no text; this server takes text only.")
            content = "".join(part.text("text") for part in parts)
        try:
            extra = message_extra(entry, role, None, number)
        except UnusableRow as error:
            raise ConfigError(f"messages cannot be used: {error}") from error
        content = "" if content is None and "tool_calls" in extra else content
        if not isinstance(content, str):
            raise ConfigError(f"content of messages[{number}] must be a text.")
        found.append({"role": "system" if role == "developer" else role, "content": content, **extra})
    return found


def _parsed(
    service: Service, fields: Fields, prompts: Sequence[tuple[int, ...]], limit: int | None, *, logprobs: int | None, chat: bool
) -> _ParsedRequest:
    sampling = Sampling(
        max_tokens=max(1, service.engine.context - len(prompts[0])) if limit is None else limit,
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=max(0, fields.whole("top_k", 0) or 0),  # vLLM's -1 is all tokens too
        min_p=fields.number("min_p", 0.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        logit_bias=_biases(fields, _tokens_known(service)),
        seed=fields.whole("seed"),
        stop=fields.texts("stop"),
        logprobs=logprobs,
    )
    sampling.check()
    stream, usage = fields.flag("stream"), fields.inner("stream_options").flag("include_usage")
    texts, schema = fields.whole("n", 1) or 0, _schema(fields)
    return _ParsedRequest(fields.text("model"), prompts, sampling, texts, stream, usage, chat, logprobs is not None, schema)


def _tokens_known(service: Service) -> int:
    """The number of token ids that both tokenizer and model have."""
    return min(len(service.text.tokenizer), int(service.text.model.config.get_text_config().vocab_size))


def _biases(fields: Fields, vocabulary: int) -> dict[int, float]:
    """logit_bias: numbers by token id, which JSON writes as text."""
    given = fields.inner("logit_bias")
    found: dict[int, float] = {}
    for name in given.data:
        if not name.isascii() or not name.isdigit() or len(name) > 9 or int(name) >= vocabulary:
            raise ConfigError(f"logit_bias has the key {name[:40]!r}; expected token ids from 0 to {vocabulary - 1}.")
        found[int(name)] = given.number(name, 0.0)
    return found


def _schema(fields: Fields) -> Mapping[str, Any] | None:
    """The schema of response_format: a given one, any JSON object, or none."""
    wanted = fields.inner("response_format")
    kind = wanted.text("type", "text")
    if kind == "json_schema":
        inner = wanted.inner("json_schema")
        if inner.data.get("schema") is None:
            raise ConfigError('response_format has no schema; expected {"type": "json_schema", "json_schema": {"schema": {…}}}.')
        return inner.inner("schema").data
    if kind not in ("text", "json_object"):
        raise ConfigError(f"type of response_format is {kind!r}; expected text, json_object or json_schema.")
    return ANY_OBJECT if kind == "json_object" else None


async def _answer(service: Service, caller: Caller, request: Incoming, parsed: _ParsedRequest, fields: Fields) -> HttpReply:
    weights = service.requested_adapters(caller, parsed.model, fields)
    writing = await service.write(caller, weights, parsed.prompts, parsed.sampling, texts=parsed.n, schema=parsed.schema)
    head = {
        "id": ("chatcmpl-" if parsed.chat else "cmpl-") + uuid.uuid4().hex,
        "created": int(time.time()),
        "model": parsed.model,
    }
    if parsed.stream:
        return HttpReply(_stream(service, writing, parsed, head), "text/event-stream")
    found = await collect_and_close(service, request, writing)
    if found is None:
        return CLIENT_GONE
    choices = [_whole(service, parsed, index, events) for index, events in enumerate(found)]
    kind = "chat.completion" if parsed.chat else "text_completion"
    return as_json({**head, "object": kind, "choices": choices, "usage": _usage(writing)})


async def _stream(service: Service, writing: Generation, parsed: _ParsedRequest, head: dict[str, Any]) -> AsyncIterator[str]:
    """Yields server-sent events, one for each piece of text."""
    kind = "chat.completion.chunk" if parsed.chat else "text_completion"
    offsets: dict[int, int] = {}  # characters of each text so far
    waiting: dict[int, list[Event]] = {}
    try:
        if parsed.chat:
            for text in writing.texts:
                delta = {"role": "assistant", "content": ""}
                yield _sse({**head, "object": kind, "choices": [{"index": text.index, "delta": delta, "finish_reason": None}]})
        async for index, event in merge_events(writing.texts):
            if event.reason == "error":
                yield _sse({"error": {"message": event.error, "type": "server_error", "param": None, "code": None}})
            elif parsed.tools:  # calls are known when the text is whole
                waiting.setdefault(index, []).append(event)
                if event.reason:
                    yield _sse({**head, "object": kind, "choices": [_with_calls(service, parsed, index, waiting.pop(index))]})
            elif event.text or event.reason or event.chosen is not None:
                piece = _piece(service, parsed, index, event, offsets.get(index, 0))
                offsets[index] = offsets.get(index, 0) + len(event.text)
                yield _sse({**head, "object": kind, "choices": [piece]})
        if parsed.usage:
            yield _sse({**head, "object": kind, "choices": [], "usage": _usage(writing)})
        yield "data: [DONE]\n\n"
    finally:
        service.close(writing)


def _with_calls(service: Service, parsed: _ParsedRequest, index: int, events: list[Event]) -> dict[str, Any]:
    """A whole reply as one piece of a stream."""
    whole = _whole(service, parsed, index, events)
    message = whole.pop("message")
    calls = [{"index": number, **call} for number, call in enumerate(message.get("tool_calls", ()))]
    delta = {"content": message["content"], **({"tool_calls": calls} if calls else {})}
    return {**whole, "delta": delta}


def _piece(service: Service, parsed: _ParsedRequest, index: int, event: Event, offset: int) -> dict[str, Any]:
    logprobs = _logprobs(service, parsed, [(event.chosen, offset)] if event.chosen else [])
    finish = _finish(event)
    if parsed.chat:
        delta = {"content": event.text} if event.text or event.chosen else {}
        return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return {"index": index, "text": event.text, "finish_reason": finish, "logprobs": logprobs}


def _whole(service: Service, parsed: _ParsedRequest, index: int, events: list[Event]) -> dict[str, Any]:
    last = events[-1]
    if last.reason == "error":
        raise LorakeetError(last.error)
    content = "".join(event.text for event in events)
    starts = accumulate((len(event.text) for event in events), initial=0)
    chosen = [(event.chosen, start) for event, start in zip(events, starts, strict=False) if event.chosen is not None]
    logprobs = _logprobs(service, parsed, chosen)
    if not parsed.chat:
        return {"index": index, "text": content, "finish_reason": _finish(last), "logprobs": logprobs}
    rest, calls = calls_in(content, parsed.tools) if parsed.tools else (content, ())
    message: dict[str, Any] = {"role": "assistant", "content": rest, "refusal": None}
    if calls:
        message |= {"content": rest or None, "tool_calls": [call.as_openai() for call in calls]}
    finish = "tool_calls" if calls else _finish(last)
    return {"index": index, "message": message, "finish_reason": finish, "logprobs": logprobs}


def _finish(event: Event) -> str | None:
    """OpenAI's "stop" or "length"; a timeout counts as "length"."""
    if event.reason is None:
        return None
    return "stop" if event.reason == "stop" else "length"


def _logprobs(service: Service, parsed: _ParsedRequest, chosen: list[tuple[SampledToken, int]]) -> dict[str, Any] | None:
    """Of tokens, each with the number of characters that were written before it."""
    if not parsed.logprobs:
        return None
    if parsed.chat:
        content = [
            {**_entry(service, one.token, one.logprob), "top_logprobs": [_entry(service, *other) for other in one.top]}
            for one, _ in chosen
        ]
        return {"content": content, "refusal": None}
    named = [(_token(service, one.token), one) for one, _ in chosen]
    return {
        "tokens": [token for token, _ in named],
        "token_logprobs": [one.logprob for _, one in named],
        "top_logprobs": [{_token(service, other): value for other, value in one.top} for _, one in named],
        "text_offset": [start for _, start in chosen],
    }


def _entry(service: Service, number: int, logprob: float | None) -> dict[str, Any]:
    token = _token(service, number)
    return {"token": token, "logprob": logprob, "bytes": list(token_bytes(service.text.tokenizer, number, token))}


def _token(service: Service, number: int) -> str:
    return decoded(service.text.tokenizer, [number], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _usage(writing: Generation) -> dict[str, Any]:
    return {
        "prompt_tokens": writing.prompt,
        "completion_tokens": writing.written,
        "total_tokens": writing.prompt + writing.written,
        "prompt_tokens_details": {"cached_tokens": writing.cached},
    }


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def models(service: Service, caller: Caller) -> HttpReply:
    """GET /v1/models: the base, and the adapters that the caller may use, each with `parent`, `root` and `dtype`."""
    same = {"object": "model", "created": service.began, "owned_by": "lorakeet", "dtype": service.number_format}
    listed = [{"id": service.base, **same, "parent": None}]
    for version in service.registry.versions:
        if caller.sees(version.name):
            about = {"parent": service.base, "root": str(version.source.path), "loaded": version.loaded, "pinned": version.pinned}
            listed.append({"id": version.name, **same, **about})
    return as_json({"object": "list", "data": listed})


async def model(service: Service, caller: Caller, name: str) -> HttpReply:
    """GET /v1/models/NAME: the base, an adapter, or a mix."""
    about = {"id": name, "object": "model", "created": service.began, "owned_by": "lorakeet"}
    return as_json({**about, "parent": service.base if service.adapters_named(caller, name) else None})

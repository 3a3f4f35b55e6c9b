"""Ollama's /api/tags, /api/chat, /api/generate, /api/version and /api/ps, as its client uses them (https://docs.ollama.com/api)."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from typing import Any

from lorakeet import __version__
from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.serve.access import Caller
from lorakeet.serve.grammar import ANY_OBJECT
from lorakeet.serve.request_fields import Fields
from lorakeet.serve.routes.multiplex import collect_and_close, merge_events
from lorakeet.serve.routes.openai import messages
from lorakeet.serve.routes.reply import CLIENT_GONE, HttpReply, Incoming, as_json
from lorakeet.serve.sampling import Sampling
from lorakeet.serve.service import Generation, Service
from lorakeet.serve.tool_replies import calls_in, tools_of

_CHAT = {"model", "messages", "stream", "options", "keep_alive", "format", "tools"}
_GENERATE = {"model", "prompt", "stream", "options", "keep_alive", "format", "system", "raw"}
_NEUTRAL: dict[str, Any] = {
    "think": False, "images": [], "suffix": "", "template": "", "context": [], "logprobs": False,
}  # fmt: skip
_OPTIONS = {
    "temperature", "top_p", "top_k", "min_p", "seed", "num_predict", "stop", "presence_penalty", "frequency_penalty",
    "repeat_penalty", "repeat_last_n",
}  # fmt: skip
_NO_EFFECT = {"num_ctx", "num_thread", "num_gpu", "num_batch", "num_keep", "use_mmap", "main_gpu", "low_vram", "numa"}
_NEUTRAL_OPTIONS: dict[str, Any] = {
    "typical_p": 1.0, "mirostat": 0, "tfs_z": 1.0,
}  # fmt: skip
_UNTIL_FULL = (-1, -2)  # Ollama's num_predict for "until the end" and "until the context is full"


async def ollama_chat(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /api/chat; the model is the name of an adapter, with or without ":latest"."""
    fields = Fields(data)
    fields.refuse(_CHAT, (), _NEUTRAL)
    tools = tools_of(fields)
    ids = await service.chat_ids(messages(fields), tools)
    return await _answer(service, caller, request, fields, ids, chat=True, tools=tools)


async def ollama_generate(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /api/generate; the prompt goes through the chat template, if there is one, unless `raw` is set."""
    fields = Fields(data)
    fields.refuse(_GENERATE, (), _NEUTRAL)
    prompt, system = fields.text("prompt", ""), fields.text("system", "")
    if not prompt:
        raise ConfigError("prompt is missing or empty.")
    if fields.flag("raw") or not service.text.tokenizer.chat_template:
        ids = await service.prompt_ids(f"{system}\n{prompt}" if system else prompt)
    else:
        turns = [{"role": "system", "content": system}] if system else []
        ids = await service.chat_ids([*turns, {"role": "user", "content": prompt}])
    return await _answer(service, caller, request, fields, ids, chat=False)


async def _answer(
    service: Service, caller: Caller, request: Incoming, fields: Fields, ids: tuple[int, ...], *, chat: bool,
    tools: tuple[dict[str, Any], ...] = (),
) -> HttpReply:  # fmt: skip
    options = fields.inner("options")
    options.refuse(_OPTIONS, _NO_EFFECT, _NEUTRAL_OPTIONS)
    most = options.whole("num_predict", -1)
    window = options.whole("repeat_last_n", 64) or 0
    left = max(1, service.engine.context - len(ids))
    sampling = Sampling(
        max_tokens=left if most is None or most in _UNTIL_FULL else most,
        temperature=options.number("temperature", 0.8),
        top_p=options.number("top_p", 0.9),
        top_k=options.whole("top_k", 0) or 0,
        min_p=options.number("min_p", 0.0),
        presence_penalty=options.number("presence_penalty", 0.0),
        frequency_penalty=options.number("frequency_penalty", 0.0),
        repetition_penalty=options.number("repeat_penalty", 1.0),
        penalty_window=None if window == -1 else max(0, window),
        seed=options.whole("seed"),
        stop=options.texts("stop"),
    )
    model = fields.text("model")
    weights = service.requested_adapters(caller, model, fields)
    writing = await service.write(caller, weights, [ids], sampling, schema=_schema(fields))
    if fields.flag("stream", True):
        return HttpReply(_stream(service, writing, model, chat, tools), "application/x-ndjson")
    found = await collect_and_close(service, request, writing)
    if found is None:
        return CLIENT_GONE
    last = found[0][-1]
    if last.reason == "error":
        raise LorakeetError(last.error)
    return as_json(_line(model, "".join(event.text for event in found[0]), chat, last.reason, writing, tools))


def _schema(fields: Fields) -> Mapping[str, Any] | None:
    """The schema of Ollama's format: "json", or a JSON schema."""
    wanted = fields.data.get("format")
    if wanted == "json":
        return ANY_OBJECT
    if isinstance(wanted, str) and wanted:
        raise ConfigError(f"format is {wanted!r}; expected json or a JSON schema.")
    return fields.inner("format").data if wanted else None


async def _stream(
    service: Service, writing: Generation, model: str, chat: bool, tools: tuple[dict[str, Any], ...]
) -> AsyncIterator[str]:
    """Yields one JSON object a line; with tools one in all, since calls are known when the text is whole."""
    whole = ""
    try:
        async for _, event in merge_events(writing.texts):
            if event.reason == "error":
                yield json.dumps({"error": event.error}) + "\n"
            elif tools:
                whole += event.text
                if event.reason:
                    yield json.dumps(_line(model, whole, chat, event.reason, writing, tools), ensure_ascii=False) + "\n"
            elif event.text or event.reason:
                yield json.dumps(_line(model, event.text, chat, event.reason, writing), ensure_ascii=False) + "\n"
    finally:
        service.close(writing)


def _line(
    model: str, text: str, chat: bool, reason: str | None, writing: Generation, tools: tuple[dict[str, Any], ...] = ()
) -> dict[str, Any]:
    rest, calls = calls_in(text, tools) if tools else (text, ())
    message: dict[str, Any] = {"role": "assistant", "content": rest}
    if calls:
        message["tool_calls"] = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    body: dict[str, Any] = {"message": message} if chat else {"response": text}
    line = {"model": model, "created_at": _now(), **body, "done": reason is not None}
    job = writing.texts[0].job
    if reason is None or job is None:
        return line
    first = (job.timing.first or time.monotonic()) - job.timing.submitted
    total = time.monotonic() - job.timing.submitted
    return {
        **line,
        "done_reason": "stop" if reason == "stop" else "length",
        "total_duration": int(total * 1e9),
        "prompt_eval_count": writing.prompt,
        "prompt_eval_duration": int(first * 1e9),
        "eval_count": writing.written,
        "eval_duration": int((total - first) * 1e9),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


async def tags(service: Service, caller: Caller, *, loaded: bool = False) -> HttpReply:
    """GET /api/tags: the base and the adapters, as models. GET /api/ps: those in memory."""
    details = {"format": "safetensors", "family": service.text.family.name, "parent_model": service.base}
    found = [{"name": service.base, "model": service.base, "modified_at": _now(), "size": 0, "digest": "", "details": details}]
    for version in service.registry.versions:
        if caller.sees(version.name) and (version.loaded or not loaded):
            about = {"size": version.source.bytes, "digest": version.source.digest, "details": details}
            found.append({"name": version.name, "model": version.name, "modified_at": _now(), **about})
    return as_json({"models": found})


async def show_model(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /api/show: what is known of the base or of an adapter."""
    fields = Fields(data)
    fields.refuse({"model", "name"}, {"verbose"}, {"system": "", "template": "", "options": {}})
    name = fields.text("model", fields.text("name", ""))
    service.adapters_named(caller, name)
    config = service.text.model.config.get_text_config()
    architecture = str(getattr(config, "model_type", "unknown"))
    template = service.text.tokenizer.chat_template
    about = {
        "general.architecture": architecture,
        "general.parameter_count": service.text.model.num_parameters(),
        f"{architecture}.context_length": service.engine.context,
        f"{architecture}.embedding_length": int(config.hidden_size),
        f"{architecture}.block_count": int(config.num_hidden_layers),
    }
    return as_json({
        "modelfile": f"FROM {service.base}\n",
        "parameters": "",
        "template": template if isinstance(template, str) else "",
        "details": {"parent_model": service.base, "format": "safetensors", "family": service.text.family.name},
        "model_info": about,
        "capabilities": ["completion", *(["tools"] if isinstance(template, str) and "tools" in template else [])],
        "modified_at": _now(),
    })  # fmt: skip


async def version(service: Service, caller: Caller) -> HttpReply:
    """GET /api/version."""
    return as_json({"version": __version__})

"""Shared by all HTTP APIs: from a model name and a prompt to generated texts, with leases, limits and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorakeet.data.template import TemplateRefused, encoded, templated
from lorakeet.data.tool_calls import unwritten
from lorakeet.errors import ConfigError
from lorakeet.models.modules import is_packed
from lorakeet.models.text.model import TextModel
from lorakeet.serve.access import Access, Caller
from lorakeet.serve.adapter_store import AdapterStore
from lorakeet.serve.engine import Engine, EngineRequest, Event, Request
from lorakeet.serve.grammar import Grammars
from lorakeet.serve.load_places import LoadPlaces
from lorakeet.serve.metrics import ServerMetrics
from lorakeet.serve.model_names import LARGEST, UnknownModel, parse_model
from lorakeet.serve.registry import Lease, Registry, Version
from lorakeet.serve.request_fields import Fields
from lorakeet.serve.sampling import Sampling

MOST_TEXTS = 16  # of a request for each prompt
log = logging.getLogger("lorakeet.serve")


class GeneratedText:
    """A text that is being generated."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.job: EngineRequest | None = None
        self.ended = asyncio.Event()
        self.reason = ""  # once it has ended
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def receive(self, event: Event) -> None:
        """Takes an event; called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is no reader
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        self._events.put_nowait(event)
        if event.reason is not None:
            self.reason = event.reason
            self.ended.set()

    async def events(self) -> AsyncIterator[Event]:
        """Yields every event; the last one has a reason."""
        while True:
            event = await self._events.get()
            yield event
            if event.reason is not None:
                return


@dataclass
class Generation:
    """The texts of one request. Always `close` it."""

    texts: tuple[GeneratedText, ...]
    lease: Lease
    prompt: int  # tokens of all prompts
    began: float
    each: int = 1  # texts of one prompt

    @property
    def cached(self) -> int:
        """Tokens of the prompts that were in the prefix cache, for the first text of each."""
        first = self.texts[:: self.each]
        return sum(text.job.cached for text in first if text.job is not None)

    @property
    def written(self) -> int:
        """Tokens of all texts so far."""
        return sum(len(text.job.written) for text in self.texts if text.job is not None)


def _outcome(writing: Generation) -> str:
    """For metrics: "error", "timeout" or "cancelled" if a text ended so, else "done"."""
    reasons = {text.reason for text in writing.texts}
    return next((reason for reason in ("error", "timeout", "cancelled") if reason in reasons), "done")


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a request."""

    timeout: float = 600.0  # seconds
    pause: float = 60.0  # seconds without a byte of an incomplete body
    body: int = 8 << 20  # bytes of JSON
    upload: int = 1 << 30  # bytes of a file
    stop: float = 5.0  # seconds from SIGTERM to the end of the process


class Service:
    """The parts of a server, and the handling of requests."""

    def __init__(
        self,
        text: TextModel,
        engine: Engine,
        registry: Registry,
        *,
        access: Access | None = None,
        store: AdapterStore | None = None,
        limits: RequestLimits | None = None,
        places: LoadPlaces | None = None,
    ) -> None:
        """`places`: where calls may load adapters from; by default the folder of the store."""
        self.places = places or LoadPlaces(() if store is None else (store.folder,))
        self.text, self.engine, self.registry = text, engine, registry
        self.access, self.store, self.limits = access or Access(), store, limits or RequestLimits()
        self.metrics, self.grammars = ServerMetrics(), Grammars(text)
        registry.loaded = self._loaded
        registry.compared = lambda version, result: self.metrics.add("checks", adapter=version.name, result=result)
        self.began = int(time.time())
        self._tokenizing = threading.Lock()  # one prompt at a time, beside the event loop
        self._longest = 0  # characters of the longest token
        self.scales: dict[str, float] = {}  # llama.cpp's: by adapter, for requests that name none
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def base(self) -> str:
        """The name of the base model."""
        return self.registry.base

    @property
    def number_format(self) -> str:
        """The coarser of the number formats of weights and products; "" where weights are packed, which says too little."""
        text = self.text
        if is_packed(text.model):
            return ""
        return str(max((text.dtype, text.products), key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")

    async def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a raw prompt, with the tokenizer's special tokens; ConfigError if it must be too long."""
        return await asyncio.to_thread(self._encoded, prompt, whole=False)

    async def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """The tokens of a conversation for the model to continue; ConfigError if the template refuses it or leaves tools out."""
        return await asyncio.to_thread(self._chat_ids, messages, tools)

    def _encoded(self, prompt: str, *, whole: bool) -> tuple[int, ...]:
        """Tokenizes `prompt`, with special tokens added unless it is `whole`.

        A prompt that cannot fit is not tokenized: megabytes would take seconds.
        """
        with self._tokenizing:
            if self._longest == 0:
                self._longest = max((len(token) for token in self.text.tokenizer.get_vocab()), default=1)
            if len(prompt) > self.engine.context * self._longest:
                raise ConfigError(
                    f"The prompt has {len(prompt):,} characters, which is more than the {self.engine.context:,} tokens of the "
                    "context can hold. Shorten it, or start the server with a larger --context."
                )
            return tuple(encoded(self.text.tokenizer, prompt, add_special_tokens=not whole))

    def _chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        tokenizer = self.text.tokenizer
        if not tokenizer.chat_template:
            raise ConfigError(f"{self.base} has no chat template; send the whole prompt to /v1/completions instead.")
        try:
            more = {"tools": list(tools)} if tools else {}
            prompt = templated(tokenizer, messages, add_generation_prompt=True, **more)
        except TemplateRefused as error:
            raise ConfigError(f"The chat template of {self.base} refuses these messages: {error}.") from error
        if left_out := unwritten(messages, tools, prompt):
            raise ConfigError(
                f"The chat template of {self.base} does not write tools ({', '.join(left_out[:3])}); leave them out, or serve a "
                "model whose template does."
            )
        return self._encoded(prompt, whole=True)

    def adapters_named(self, caller: Caller, model: str) -> dict[str, float]:
        """The adapters of `model` by weight, among those that this caller may see."""
        return parse_model(model, base=(self.base,), known=caller.visible(self.registry.names))

    def requested_adapters(self, caller: Caller, model: str, fields: Fields) -> dict[str, float]:
        """As `adapters_named`; for the base, those of llama.cpp's `lora` list, or the scales that are set for all requests."""
        named = self.adapters_named(caller, model)
        if fields.data.get("lora") is not None:
            if named:
                raise ConfigError("lora and an adapter as model exclude each other; name the base as model with lora.")
            return self.by_number(caller, fields.data["lora"])
        scales = dict(self.scales)  # which other threads change
        return named or {name: scale for name, scale in scales.items() if scale and caller.sees(name)}

    def by_number(self, caller: Caller, data: Any) -> dict[str, float]:
        """llama.cpp's [{"id", "scale"}] as weights by name; ids are those of GET /lora-adapters."""
        if not isinstance(data, list):
            raise ConfigError('Expected a list such as [{"id": 0, "scale": 0.5}].')
        numbered = {self.registry.number_of(name): name for name in caller.visible(self.registry.names)}
        found: dict[str, float] = {}
        for entry in data:
            fields = Fields(entry, "an entry of the list")
            number, scale = fields.whole("id"), fields.number("scale", 1.0)
            if not abs(scale) <= LARGEST:  # NaN is no scale either
                raise ConfigError(f"The scale of adapter {number} is {scale:g}; at most ±{LARGEST:g} is taken.")
            if number not in numbered:
                raise ConfigError(f"There is no adapter {number}; GET /lora-adapters lists them.")
            if scale:
                found[numbered[number]] = scale
        return found

    async def write(
        self, caller: Caller, weights: dict[str, float], prompts: Sequence[tuple[int, ...]], sampling: Sampling, *,
        texts: int = 1, schema: Mapping[str, Any] | None = None,
    ) -> Generation:  # fmt: skip
        """Starts `texts` texts after each of the `prompts`, in order, as JSON of `schema` if given.

        All refusals, of the schema, the registry and the engine, are raised before anything is generated.
        """
        if not 1 <= texts <= MOST_TEXTS:
            raise ConfigError(f"n is {texts}; it must lie between 1 and {MOST_TEXTS}.")
        count, most = texts * len(prompts), self.engine.most_waiting + self.engine.cache.slots
        if count > most:
            raise ConfigError(
                f"{len(prompts)} prompts with n {texts} are {count} texts; this server takes {most} at most, waiting ones "
                "included. Send fewer at once, or start it with a larger --queue."
            )
        caller.count(count)
        began = time.monotonic()
        grammar = None if schema is None else await asyncio.to_thread(self.grammars.of_schema, schema)
        lease = await asyncio.to_thread(self.registry.lease_of, weights)
        started = tuple(GeneratedText(index) for index in range(count))
        writing = Generation(started, lease, sum(map(len, prompts)), began, texts)
        try:
            for text in writing.texts:
                which, number = divmod(text.index, texts)
                seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
                request = Request(prompts[which], seeded, lease.adapters, self.limits.timeout, grammar)
                text.job = self.engine.submit(request, text.receive)
        except BaseException:
            self.close(writing, "refused")
            raise
        return writing

    def close(self, writing: Generation, outcome: str = "") -> None:
        """Cancels unfinished texts, and releases the lease when all have ended."""
        task = asyncio.get_running_loop().create_task(self._end(writing, outcome))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, writing: Generation, outcome: str) -> None:
        started = [text for text in writing.texts if text.job is not None]
        late = [text for text in started if not text.ended.is_set()]
        for text in late:
            assert text.job is not None
            text.job.cancel()
            await text.ended.wait()
        await asyncio.to_thread(self.registry.release, writing.lease)
        label = writing.lease.label or self.base
        outcome = outcome or ("cancelled" if late else _outcome(writing))
        self.metrics.add("requests", adapter=label, outcome=outcome)
        for text in started:
            assert text.job is not None
            self._measure(label, writing.began, text.job)
        log.info(
            "request model=%s outcome=%s prompt=%d cached=%d written=%d seconds=%.3f",
            label, outcome, writing.prompt, writing.cached, writing.written, time.monotonic() - writing.began,
        )  # fmt: skip

    def _loaded(self, version: Version) -> None:
        self.metrics.add("loads", adapter=version.name)
        self.metrics.observe("load", version.load_seconds, adapter=version.name)

    def _measure(self, label: str, began: float, job: EngineRequest) -> None:
        timing = job.timing
        self.metrics.add("prompt", len(job.request.ids), adapter=label)
        self.metrics.add("cached", job.cached, adapter=label)
        self.metrics.add("written", len(job.written), adapter=label)
        if timing.first:
            self.metrics.observe("first", timing.first - began, adapter=label)
            if len(job.written) > 1:
                self.metrics.observe("token", (timing.ended - timing.first) / (len(job.written) - 1), adapter=label)

    async def settle(self) -> None:
        """Waits until every request that was closed has ended."""
        while self._ending:
            await asyncio.gather(*self._ending)

    def unknown(self, caller: Caller, name: str) -> UnknownModel:
        """The error for a name that this caller cannot see, the same whether it exists or not."""
        with contextlib.suppress(UnknownModel):
            parse_model(name, base=(), known=caller.visible(self.registry.names))
        return UnknownModel(f"No adapter '{name}' is loaded.")

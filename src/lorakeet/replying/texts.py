"""Texts from a base model with adapters: in one batch, each text with its own, or streamed from disk under a memory budget."""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Encoder
from lorakeet.data.rows import Row, Turn
from lorakeet.data.shapes import ROLES
from lorakeet.data.spec import DataSpec
from lorakeet.data.template import encoded
from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.memory.free import fits_now
from lorakeet.memory.spec import MemorySpec
from lorakeet.merging.combine import CombineSpec, combination
from lorakeet.models.families import family_of_model
from lorakeet.models.files.source import find_source
from lorakeet.models.generate.sample import sample_by
from lorakeet.models.inject import activate, adapter_names, eject
from lorakeet.models.placement import device_for, text_dtype_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import empty_model
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.models.text.model import TextModel, served_context_of
from lorakeet.models.text.serving import ServingModel
from lorakeet.planning.evaluation import fit_evaluation
from lorakeet.planning.fit import Say
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.runs.residency import MemoryPlan, Residency
from lorakeet.runs.trained_prompt import trained_prompt
from lorakeet.serve.engine import Engine, Event, Request
from lorakeet.serve.sampling import Sampling, TokenSampler
from lorakeet.serve.text_stream import TextStream

Prompt: TypeAlias = str | Sequence[dict[str, Any]]
Mix: TypeAlias = "tuple[tuple[Adapter, float], ...]"  # adapters with weights; empty for the base
Identity: TypeAlias = "tuple[int, int]"
TOGETHER = 16  # texts of a batch
ON_MODEL = 32  # adapters that stay on a model between calls
BESIDE = 1 << 30  # bytes of a GPU, at most, beside weights and cache: a pass, the libraries' workspaces, the allocator
_LONGEST = 1 << 30  # tokens: a prompt is never truncated without a word


def silent(_: str) -> None:
    """Prints nothing."""


def open_texts(
    spec: ModelSpec, memory: MemorySpec, adapter: Adapter | None, *, context: int, slots: int = 1,
    say: Say = silent,
) -> TextSource:  # fmt: skip
    """The model of `spec`, ready to write; streamed where its weights exceed a budget, or without one the free memory of its
    GPU, which is said.

    `slots` texts of `context` tokens are expected at once. Under a budget a prompt and its reply may not have more, and an
    adapter about the size of `adapter`. Raises as `load_text_model` and `fit_budget` do.
    """
    residency: Residency[MemoryPlan] = Residency()
    if memory.limit or _may_exceed_gpu(spec, context * slots):
        config = RunConfig(model=spec, memory=memory, data=DataSpec(max_tokens=context))
        needed, about = adapter or _outline(spec), Workload(labelled=False)
        residency = fit_evaluation(config, needed, silent if memory.limit else say, about, what="writing texts")
    if residency.store is None and not memory.limit:
        return BatchedTexts(load_text_model(spec), slots=slots, length=context if slots > 1 else 512)
    if residency.store is None:
        return BatchedTexts(load_text_model(spec), context, slots=slots)
    text = load_text_model(spec, store=residency.store, slots=residency.way.slots, pinned=residency.pinned)
    return StreamedTexts(text, context)


def _may_exceed_gpu(spec: ModelSpec, tokens: int) -> bool:
    """Whether the model, with keys and values of so many tokens, could take more than is free on its GPU: a quick upper bound,
    as if no weight were quantised and each head had keys of its own. False where there is no GPU."""
    device = device_for(spec.device)
    if device.type != "cuda":
        return False
    config = read_config(find_source(spec, silent))
    numbers = sum(parameter.numel() for parameter in empty_model(config, torch.float32).parameters())
    words = config.get_text_config()
    states = 2 * tokens * int(words.num_hidden_layers) * int(words.hidden_size)
    return not fits_now(BESIDE + (numbers + numbers // 8 + states) * text_dtype_for(spec.dtype, device).itemsize, device)


def _outline(spec: ModelSpec) -> Adapter:
    """An adapter of rank 1 on every linear layer, on the meta device: the least that a plan of an evaluation takes."""
    config = read_config(find_source(spec, silent))
    plan = plan_for(empty_model(config, torch.float32), LoraSpec(rank=1), family_of_model(config))
    with torch.device("meta"):
        pairs = {
            entry.path: Pair(torch.empty(entry.shape_a), torch.empty(entry.shape_b), entry.alpha, entry.kind)
            for entry in plan.entries
        }
    return Adapter(pairs)


class TextSource(ABC):
    """A model in memory, with the adapters that were used last; `closed` once it is given up."""

    def __init__(self, text: TextModel, context: int | None = None) -> None:
        self.text, self.context = text, min(filter(None, (context, served_context_of(text.model.config))), default=None)
        self.closed = False

    def ids(self, prompt: Prompt, data: DataSpec, *, raw: bool) -> tuple[int, ...]:
        """The tokens of a prompt, as training encodes it with the settings `data`; as it is with `raw`.

        A user's text becomes the prompt of a row with data.labels (runs/trained_prompt). Raises ConfigError for what is no
        prompt, and as `trained_prompt` does; DataError where the chat template refuses it.
        """
        turns = _turns(prompt, raw=raw)
        if raw:
            ids = encoded(self.text.tokenizer, turns[0].text, add_special_tokens=True)
        else:
            system = (Turn("system", data.system, False),) if data.system and turns[0].role != "system" else ()
            settings = DataSpec(train=data.train, max_tokens=_LONGEST, chat_template=data.chat_template, separator=data.separator)
            written = (_as_trained(turn, data) for turn in turns)
            row = Row((*system, *written, Turn("assistant", "ok", True)), None, None, "the prompt")
            found = Encoder(self.text.tokenizer, settings).question(row)
            ids = [] if found is None else [int(number) for number in found[0]]
        if not ids:
            raise ConfigError(f"The prompt {prompt!r:.80} has no token; it needs at least one.")
        return tuple(ids)

    def require_fitting(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Raises ConfigError for settings out of range, and for a prompt that leaves no place for a reply."""
        sampling.check()
        longest = max(map(len, prompts))
        if self.context is not None and longest >= self.context:
            raise ConfigError(
                f"A prompt has {longest:,} tokens; with at least one to write, at most {self.context - 1:,} fit. Shorten it."
            )

    @abstractmethod
    def texts(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], sampling: Sampling) -> list[str]:
        """The reply to each prompt, with its own adapters."""

    @abstractmethod
    def pieces(self, prompt: Sequence[int], mix: Mix, sampling: Sampling) -> Iterator[str]:
        """The reply to one prompt, piece by piece."""

    @abstractmethod
    @contextmanager
    def active(self, adapter: Adapter | None) -> Iterator[None]:
        """A context in which the model computes with this adapter."""

    @abstractmethod
    def close(self) -> None:
        """Frees what is beside the model."""


class BatchedTexts(TextSource):
    """All texts in one batch (serve/engine), with pairs on linear layers."""

    def __init__(self, text: TextModel, context: int | None = None, *, slots: int = 1, length: int = 512) -> None:
        """`slots` texts of `length` tokens are expected at least: a cache that is too small is made anew, and forgets."""
        super().__init__(text, context)
        self.live, self._slots, self._length = ServingModel(text), slots, length
        self._names: OrderedDict[Identity, tuple[str, Adapter]] = OrderedDict()  # the last used last
        self._count = 0
        self._engine: Engine | None = None

    def texts(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], sampling: Sampling) -> list[str]:
        self.require_fitting(prompts, sampling)
        weights = self._attached(mixes)
        engine, events = self._started(prompts, sampling), queue.SimpleQueue[tuple[int, Event]]()
        jobs, written, left = [], ["" for _ in prompts], set(range(len(prompts)))
        try:
            for number, (ids, adapters) in enumerate(zip(prompts, weights, strict=True)):
                request = Request(tuple(ids), _seeded(sampling, number), adapters)
                jobs.append(engine.submit(request, partial(_put, events, number)))
            while left:
                number, event = events.get()
                written[number] += event.text
                if event.reason is not None:
                    left.discard(number)
                    _raise_failed(event)  # also for one that another call has cancelled
        finally:
            for job in jobs:
                job.cancel()
        return written

    def pieces(self, prompt: Sequence[int], mix: Mix, sampling: Sampling) -> Iterator[str]:
        self.require_fitting([prompt], sampling)
        [adapters] = self._attached([mix])
        engine, events = self._started([prompt], sampling), queue.SimpleQueue[tuple[int, Event]]()
        job = engine.submit(Request(tuple(prompt), sampling, adapters), partial(_put, events, 0))
        try:
            while True:
                _, event = events.get()
                if event.text:
                    yield event.text
                if event.reason is not None:
                    _raise_failed(event)
                    return
        finally:
            job.cancel()

    @contextmanager
    def active(self, adapter: Adapter | None) -> Iterator[None]:
        self._stop()  # its thread would compute beside this one; replies that were started are written first
        [names] = self._attached([((adapter, 1.0),) if adapter is not None else ()])
        self.live.selection.use(next(iter(names), None))
        try:
            yield
        finally:
            self.live.selection.use(None)

    def close(self) -> None:
        self.closed = True
        self._stop(timeout=0.0)

    def _attached(self, mixes: Sequence[Mix]) -> list[dict[str, float]]:
        """The weights of each mix by the names of its adapters on the model, to which new ones are added."""
        needed = {_identity(adapter): adapter for mix in mixes for adapter, _ in mix}
        for key, adapter in needed.items():
            if key not in self._names:
                self._count += 1
                self.live.attach(f"adapter-{self._count}", adapter)
                self._names[key] = (f"adapter-{self._count}", adapter)
            self._names.move_to_end(key)
        for known in [known for known in self._names if known not in needed][: max(0, len(self._names) - ON_MODEL)]:
            self.live.detach(self._names.pop(known)[0])
        found = [{self._names[_identity(adapter)][0]: weight for adapter, weight in mix} for mix in mixes]
        for mix in found:
            if list(mix.values()) not in ([], [1.0]) and not all(map(self.live.mixes, mix)):
                raise ConfigError("DoRA and biases cannot be mixed or weighted. Use such an adapter alone, with weight 1.")
        return found

    def _started(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Engine:
        """An engine whose cache is large enough for these texts."""
        longest = max(max(map(len, prompts)) + sampling.max_tokens, self._length)
        length = -(-longest // 512) * 512 if self.context is None else min(-(-longest // 512) * 512, self.context)
        slots = min(TOGETHER, max(len(prompts), self._slots))
        if self.closed:
            raise ConfigError("The model was released while this reply was open. Call generate or stream again.")
        found = self._engine
        too_small = found is None or found.context < length or found.cache.slots < slots or len(prompts) > found.most_waiting
        if found is None or too_small or not found.ready:
            self._stop()
            found = self._engine = Engine(
                self.text, self.live.selection, slots=slots, context=length, waiting=max(256, len(prompts))
            )
            found.start()
        return found

    def _stop(self, timeout: float | None = None) -> None:
        if self._engine is not None:
            self._engine.drain(timeout)
            self._engine = None


class StreamedTexts(TextSource):
    """A model whose blocks are streamed from a store: texts with one adapter together, one adapter after the other."""

    def texts(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], sampling: Sampling) -> list[str]:
        self.require_fitting(prompts, sampling)
        sampling.check()
        written = ["" for _ in prompts]
        for mix in {_key(one): one for one in mixes}.values():
            numbers = [number for number, one in enumerate(mixes) if _key(one) == _key(mix)]
            with self.active(_summed(mix)):
                chosen = [prompts[number] for number in numbers]
                samplers = [TokenSampler(_seeded(sampling, number), prompt=prompts[number]) for number in numbers]
                by = [lambda logits, own=own: own.choose(logits).token for own in samplers]
                found = sample_by(self.text, chosen, by, max_tokens=sampling.max_tokens)
            for number, ids in zip(numbers, found, strict=True):
                written[number] = _decoded(self.text, ids.tolist(), sampling)
        return written

    def pieces(self, prompt: Sequence[int], mix: Mix, sampling: Sampling) -> Iterator[str]:
        yield self.texts([prompt], [mix], sampling)[0]

    @contextmanager
    def active(self, adapter: Adapter | None) -> Iterator[None]:
        if adapter is not None:
            add_adapter(self.text, adapter)
        try:
            yield
        finally:
            if adapter_names(self.text.model):
                activate(self.text.model, None)
                eject(self.text.model)

    def close(self) -> None:
        self.closed = True
        if self.text.streamed is not None:
            self.text.streamed.stream.close()


def _as_trained(turn: Turn, data: DataSpec) -> Turn:
    return replace(turn, text=trained_prompt(turn.text, data, data.labels)) if turn.role == "user" else turn


def _identity(adapter: Adapter) -> Identity:
    """The adapter, and how often its numbers were changed in place: what was changed is another one."""
    tensors = (part for pair in adapter.pairs.values() for part in (pair.A, pair.B))
    return id(adapter), sum(tensor._version for tensor in tensors if not tensor.is_inference())


def _key(mix: Mix) -> tuple[tuple[int, float], ...]:
    return tuple((id(adapter), weight) for adapter, weight in mix)


def _summed(mix: Mix) -> Adapter | None:
    """The mix as one adapter, exactly; None for the base."""
    if not mix or (len(mix) == 1 and mix[0][1] == 1.0):
        return mix[0][0] if mix else None
    spec = CombineSpec("cat", tuple(weight for _, weight in mix))
    return combination({str(number): adapter for number, (adapter, _) in enumerate(mix)}, spec).combined().adapter


def _turns(prompt: Any, *, raw: bool) -> tuple[Turn, ...]:
    if isinstance(prompt, str):
        return (Turn("" if raw else "user", prompt, False),)
    wanted = "a text, or messages such as {'role': 'user', 'content': 'Hello'}"
    if raw or not isinstance(prompt, (list, tuple)) or not prompt:
        raise ConfigError(f"The prompt is {prompt!r:.80}; expected {'a text, since raw is set' if raw else wanted}.")
    for message in prompt:
        known = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not known:
            raise ConfigError(f"A message of the prompt is {message!r:.80}; expected {wanted}; roles are {', '.join(ROLES)}.")
    return tuple(Turn(message["role"], message["content"], False) for message in prompt)


def _put(events: queue.SimpleQueue[tuple[int, Event]], number: int, event: Event) -> None:
    events.put((number, event))


def _raise_failed(event: Event) -> None:
    if event.reason == "error":
        raise LorakeetError(event.error)
    if event.reason == "cancelled":
        raise LorakeetError("This reply was cut short: the model was released. Finish a stream before release().")


def _seeded(sampling: Sampling, number: int) -> Sampling:
    """The settings of text `number`: with a seed, each text has its own."""
    if sampling.seed is None or not number:
        return sampling
    return Sampling(**{**vars(sampling), "seed": sampling.seed + number})


def _decoded(text: TextModel, ids: list[int], sampling: Sampling) -> str:
    stream = TextStream(text.tokenizer, sampling.stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return "".join([*pieces, stream.end()])

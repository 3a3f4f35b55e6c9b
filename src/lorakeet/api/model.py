"""A base model as a Python value: planned, generated from and measured with any adapter; loaded at first use."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from lorakeet.api.adapter import AdapterValue
from lorakeet.api.arguments import given_as, in_python, python_call, require_kinds
from lorakeet.api.display import ShownPlan, table_of
from lorakeet.api.in_memory_model import saved_model
from lorakeet.api.rows import RowPart, RowSet
from lorakeet.config import RunConfig, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Encoder
from lorakeet.data.locate import locate_model
from lorakeet.data.spec import NO_ROWS, DataSpec
from lorakeet.errors import ConfigError, nearest
from lorakeet.memory.allocator import release_free_memory
from lorakeet.memory.spec import MemorySpec
from lorakeet.models.generate.score import row_losses
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.model import TextModel
from lorakeet.replying.texts import Mix, Prompt, TextSource, open_texts
from lorakeet.runs.terminal import TerminalConsole
from lorakeet.runs.trained_prompt import prompt_settings
from lorakeet.serve.sampling import Sampling
from lorakeet.settings import load as load_settings
from lorakeet.settings import to_mapping
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.verbs.plan import plan

AnyAdapter: TypeAlias = Adapter | str | Path | Any | None  # Any: a run, which has an `adapter`
CONTEXT = 2048  # tokens of a prompt with its reply under a budget
_USED: ContextVar[Mapping[int, AnyAdapter]] = ContextVar("_USED", default={})  # noqa: B039 (never changed); adapters by handle


@python_call(in_python)
def load(
    model: Any,
    *,
    quantize: str = "none",
    budget: str = "",
    tokenizer: Any = None,
    folder: str | Path | None = None,
    **settings: Any,
) -> BaseModelHandle:
    """A base model; its weights are read when they are first needed.

    `model`: a hub id, a folder, a .gguf file, 'package:NAME', or a transformers model in memory with its `tokenizer`. Such a
    model is saved to `folder` (default: in the cache folder), since runs, merges and certificates read files.
    `quantize`: none, nf4, int8 or gguf. `budget`: memory for everything, such as "2GiB". `settings`: other fields of ModelSpec.

    Raises ConfigError for a wrong setting, and for a path where nothing is.
    """
    if not isinstance(model, (str, Path)):
        model = saved_model(model, tokenizer, folder)
    elif tokenizer is not None or folder is not None:
        raise ConfigError(f"tokenizer= and folder= go with a model in memory, but model is {str(model)!r}. Leave them out.")
    mapping = {"path": str(model), "quantize": quantize, **settings}
    spec = load_settings(ModelSpec, mapping, where="lk.load")
    locate_model(spec.path)  # raises for a path where nothing is
    return BaseModelHandle(spec, load_settings(MemorySpec, {"budget": budget}, where="lk.load"))


class BaseModelHandle:
    """A frozen base model with its settings. Any thread may call it; calls wait for each other."""

    def __init__(self, spec: ModelSpec, memory: MemorySpec = MemorySpec()) -> None:
        self.spec, self.memory = spec, memory
        self._opened: TextSource | None = None
        self._closing: finalize[..., BaseModelHandle] | None = None  # closes what is open when the handle goes
        self._calling = threading.RLock()

    def __repr__(self) -> str:
        kept = f", budget {self.memory.budget}" if self.memory.budget else ""
        packed = "" if self.spec.quantize.method == "none" else f", {self.spec.quantize.method}"
        return f"Model {self.spec.path}{packed}{kept}{'' if self._opened is None else ', in memory'}"

    def _repr_html_(self) -> str:
        packed = self.spec.quantize.method
        rows = [("model", self.spec.path), ("weights", "as stored" if packed == "none" else packed)]
        rows += [("budget", self.memory.budget or "none"), ("in memory", "no" if self._opened is None else "yes")]
        return table_of([("", "base model"), *rows])

    @python_call(in_python)
    def plan(
        self,
        lora: LoraSpec = LoraSpec(),
        *,
        rows: RowSet | None = None,
        train: TrainSpec = TrainSpec(),
        tokens: int | None = None,
    ) -> ShownPlan:
        """The memory and time of a run on these rows, phase by phase; no weight is read.

        Without rows, micro-batches are full and rows have data.max_tokens, or `tokens`. Raises ConfigError for settings that do
        not fit the model.
        """
        data = DataSpec(train=NO_ROWS) if rows is None else rows.spec
        config = RunConfig(model=self.spec, lora=lora, data=data, train=train, memory=self.memory)
        if tokens is not None:
            config = config.changed(data={"max_tokens": tokens}, train={"micro_tokens": tokens})
        config = load_settings(RunConfig, to_mapping(config), where="Model.plan")
        console = TerminalConsole(file=StringIO(), record=True, width=110, force_jupyter=False)
        return ShownPlan(plan(config, console=console), console)

    @python_call(in_python)
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        adapter: AnyAdapter | Sequence[AnyAdapter] = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        raw: bool = False,
        template: bool = True,
        **sampling: Any,
    ) -> Any:
        """The reply to a prompt, or the replies to a list of prompts, computed together.

        A prompt is a text or a list of chat messages ({'role': …, 'content': …}). A text goes through the chat template as one
        user message, unless `raw`. `adapter`: a run, an adapter or its path; a list gives each prompt its own, None the base.
        With a run, prompts are written as its training rows were: its system prompt first and, for labelled rows, a text in its
        data.template. `template=False` leaves data.template out; a text that stands in it already stays as it is.
        Temperature 0 takes the likeliest token. `sampling`: other fields of Sampling, such as top_p, seed and stop.

        Raises ConfigError for settings out of range, an adapter that does not fit, and a prompt that is too long.
        """
        several = isinstance(prompt, (list, tuple)) and not (prompt and isinstance(prompt[0], dict))
        if several and not prompt:
            return []
        prompts: list[Any] = list(prompt) if several else [prompt]
        adapters = self._adapters(adapter, len(prompts))
        settings = Sampling(max_tokens=max_tokens, temperature=temperature, **_checked(sampling))
        written = [data if template else replace(data, template=DataSpec.template) for _, data in adapters]
        with self._calling:
            generation = self._generation(adapters)
            ids = [generation.ids(one, data, raw=raw) for one, data in zip(prompts, written, strict=True)]
            texts = generation.texts(ids, [_alone(one) for one, _ in adapters], settings)
        return texts if several else texts[0]

    @python_call(in_python)
    def stream(
        self, prompt: Prompt, *, adapter: AnyAdapter = None, max_tokens: int = 256, temperature: float = 0.0, raw: bool = False,
        template: bool = True, **sampling: Any,
    ) -> Iterator[str]:  # fmt: skip
        """The reply piece by piece, as it is written; arguments as in `generate`. Ending the iteration stops it."""
        [found] = self._adapters(adapter, 1)
        settings = Sampling(max_tokens=max_tokens, temperature=temperature, **_checked(sampling))
        data = found[1] if template else replace(found[1], template=DataSpec.template)
        with self._calling:
            generation = self._generation([found])
            pieces = generation.pieces(generation.ids(prompt, data, raw=raw), _alone(found[0]), settings)
        return self._started(pieces)

    def _started(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces; the first one waits for other calls, and after it nothing is changed on the model."""
        with self._calling:
            first = next(pieces, None)
        if first is not None:
            yield first
            yield from pieces

    @python_call(in_python)
    def losses(self, rows: RowSet | RowPart, *, adapter: AnyAdapter = None, micro_tokens: int = 2048) -> NDArray[np.float64]:
        """The loss of each row in nats per target token, (rows,): of `rows.held_out`, or of the part that is given.

        NaN for a row that is too long, where data.too_long is drop.
        """
        part = rows.held_out if isinstance(rows, RowSet) else rows
        [(found, _)] = self._adapters(adapter, 1)
        with self.computing_with(found) as text:
            encoder = Encoder(text.tokenizer, part.spec, part.labels)
            examples = [encoder.encode(row) for row in part]
            kept = [number for number, example in enumerate(examples) if example is not None]
            sums, counts = row_losses(text, [one for one in examples if one is not None], micro_tokens=micro_tokens)
        losses = np.full(len(examples), np.nan)
        losses[kept] = sums / counts
        return losses

    @contextmanager
    def computing_with(self, adapter: Adapter | None) -> Iterator[TextModel]:
        """A context with the loaded model, in which the adapter is active (None: the base alone)."""
        with self._calling:
            generation = self._generation([(adapter, DataSpec(train=NO_ROWS))])
            with generation.active(adapter):
                yield generation.text

    @contextmanager
    def using(self, adapter: AnyAdapter) -> Iterator[BaseModelHandle]:
        """A context in which `generate`, `stream` and `losses` use this adapter where they are given none."""
        before = _USED.set({**_USED.get(), id(self): adapter})
        try:
            yield self
        finally:
            _USED.reset(before)

    def release(self) -> None:
        """Frees the weights; they are read again when they are needed."""
        with self._calling:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
                if self._closing is not None:
                    self._closing.detach()  # it holds the weights
                release_free_memory()

    def _generation(self, adapters: Sequence[tuple[Adapter | None, DataSpec]]) -> TextSource:
        if self._opened is None or self._opened.closed:
            needed = next((one for one, _ in adapters if one is not None), None)
            self._opened = open_texts(self.spec, self.memory, needed, context=CONTEXT)
            self._closing = finalize(self, self._opened.close)  # its thread would keep the weights
        return self._opened

    def _adapters(self, given: Any, count: int) -> list[tuple[Adapter | None, DataSpec]]:
        """The adapter of each prompt, with the data settings of its run."""
        if isinstance(given, (list, tuple)):
            if len(given) != count:
                raise ConfigError(f"There are {len(given)} adapters for {count} prompts; give each its own, or one for all.")
            return [adapter_and_data(one) for one in given]
        return [adapter_and_data(_USED.get().get(id(self)) if given is None else given)] * count


def _alone(adapter: Adapter | None) -> Mix:
    return () if adapter is None else ((adapter, 1.0),)


def adapter_and_data(given: AnyAdapter) -> tuple[Adapter | None, DataSpec]:
    """An adapter of a run, a path or a value, with the settings of its run's prompts (defaults if it has none)."""
    data = DataSpec(train=NO_ROWS)
    if given is None or isinstance(given, Adapter):
        return given, data
    if isinstance(given, (str, Path)):
        path = Path(given)
        run = RunFolder.around(path)
        return _read(path, _stamp(path)), data if run is None else prompt_settings(read_run(run.config).data, run)
    if not isinstance(getattr(given, "adapter", None), Adapter):
        raise ConfigError(f"adapter is {given_as(given)}; expected a run, an adapter, its path, or None for the base.")
    return given.adapter, prompt_settings(given.config.data, given.folder)


@lru_cache(maxsize=32)
def _read(path: Path, stamp: tuple[float, ...]) -> AdapterValue:
    """The adapter at `path`, read once for as long as its files have the same times."""
    return AdapterValue.read(path)


def _stamp(path: Path) -> tuple[float, ...]:
    folders = [part for part in (path, path / "adapter") if part.is_dir()]
    files = [path] if path.is_file() else sorted(file for folder in folders for file in folder.iterdir())
    return tuple(file.stat().st_mtime for file in files)


def _checked(sampling: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings. Raises ConfigError for an unknown name."""
    known = Sampling.__dataclass_fields__
    if unknown := [name for name in sampling if name not in known]:
        taken = [*known, "adapter", "raw", "template"]
        raise ConfigError(f"generate has no argument {unknown[0]!r}.{nearest(unknown[0], taken)} It takes {', '.join(taken)}.")
    if isinstance(sampling.get("stop"), (str, list)):
        stop = sampling["stop"]
        sampling = {**sampling, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
    require_kinds(sampling, Sampling)
    return sampling

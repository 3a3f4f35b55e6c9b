"""A finished adapter opened again: a run folder with its settings, or a bare adapter folder with the base that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.data.prepare import Dataset, load_dataset
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.detect import read_certified
from lorakeet.formats.identity import joined_notes, require_base
from lorakeet.memory.budget import Budget
from lorakeet.models.files.origin import stored_as
from lorakeet.models.files.source import on_this_machine
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import Changes
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.load import load_text_model, load_tokenizer
from lorakeet.models.text.model import TextModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.certified import base_identity
from lorakeet.runs.residency import Residency
from lorakeet.train.run import RunFolder

NAME = "default"


@dataclass(frozen=True)
class Opened:
    """An adapter with what is known about it; `run` is None for a bare adapter folder."""

    adapter: Adapter
    config: RunConfig
    run: RunFolder | None
    folder: Path
    note: str = ""  # how it was compared with its certificate, for results; empty if it is what was certified
    residency: Residency[Any] = field(default_factory=Residency)  # how its models keep the memory budget

    _datasets: dict[DataSpec, Dataset] = field(default_factory=dict, repr=False, compare=False)  # shared by copies

    @property
    def dataset(self) -> Dataset:
        """The rows of config.data: read, split and checked once for this adapter and its copies. Raises DataError."""
        data = self.config.data
        if data not in self._datasets:
            self._datasets[data] = load_dataset(data, self.config.train.registered)
        return self._datasets[data]

    @property
    def dense_spec(self) -> ModelSpec:
        """The base as it was before it was quantised for the run."""
        return dataclasses.replace(self.config.model, quantize=QuantSpec())

    @property
    def trained_model(self) -> ModelSpec:
        """The base as the adapter was trained on it, whatever --base says now; of a bare adapter what its file names."""
        if self.run is None:
            return ModelSpec(path=self.adapter.named_base or self.config.model.path)
        return dataclasses.replace(read_run(self.run.config).model, device=self.config.model.device)

    @property
    def trained_on(self) -> str:
        """How that base was quantised, as it was loaded or on disk (nf4, int8, gptq, gguf); empty where it was not.

        Where it is not at its place any more, the base that --base names is looked at.
        """
        model = self.trained_model
        here = model if on_this_machine(model) is not None else self.config.model
        return model.quantize.method.replace("none", "") or stored_as(here)

    def over(self, model: ModelSpec) -> Opened:
        """The same adapter on another base, or on the same one loaded in another way."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

    def text_model(
        self, console: Console, *, dtype: str | None = None, with_adapter: bool = True, changes: Changes | None = None
    ) -> TextModel:
        """The base with the adapter attached and active, streamed if `residency` says so; `dtype` overrides the one that the run
        was trained in. `changes` are made to the weights on their way into the store of a streamed model.
        """
        spec, residency = self.config.model, self.residency
        if dtype is not None:
            spec = dataclasses.replace(spec, dtype=dtype, products=dtype)  # type: ignore[arg-type]
        text = load_text_model(
            spec, say=console.print, store=residency.store, slots=residency.way.slots, pinned=residency.pinned, changes=changes
        )
        if self.tokenizer is not None:
            text = dataclasses.replace(text, tokenizer=load_tokenizer(self.tokenizer))
        if with_adapter:
            for rows in self.adapter.token_rows.values():
                ids = text.add_tokens(rows.tokens)
                if rows.tokens and ids != rows.ids:
                    raise DataError(
                        f"The new tokens {', '.join(rows.tokens)} of {self.folder} have the ids {rows.ids}, but the tokenizer "
                        f"gives them {ids}. Put the tokenizer of the training beside the adapter, or name the base that it was "
                        "trained on."
                    )
            add_adapter(text, self.adapter, NAME)
        return text

    def within(self, memory: str | None) -> Opened:
        """The same, with `memory` (such as "2GiB") in place of the run's memory.budget; None keeps that."""
        if memory is None:
            return self
        Budget.parse(memory)  # refused now
        return dataclasses.replace(self, config=self.config.changed(memory={"budget": memory}))

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer that was saved beside the adapter, as a run with new tokens does; None without one."""
        return self.folder if (self.folder / "tokenizer_config.json").is_file() else None


def open_adapter(
    path: Path,
    *,
    base: str | None = None,
    config: Path | None = None,
    uncertified: bool = False,
    say: Callable[[str], None] = print,
) -> Opened:
    """The adapter in a run folder or in a folder of PEFT's layout. `base` and `config` win over what is written there;
    `say` hears what is odd about it.

    Raises DataError where there is no adapter, ConfigError where nothing says which base it belongs to, and VerificationFailed
    where adapter or base are not what its certificate was made for, unless `uncertified`.
    """
    run = RunFolder.at(path)
    given = read_run(config) if config else read_run(run.config) if run else None
    if given is not None:
        require_text_run(path, given)
    adapter, note = read_certified(path, uncertified=uncertified, say=say)
    settings = given or _bare(path, adapter, base)
    if not config:  # a run remembers the device that it was trained on; this machine may have another
        settings = settings.changed(model={"device": "auto"})
    if base is not None:
        settings = settings.changed(model={"path": base})
    settings = dataclasses.replace(settings, uncertified=uncertified or settings.uncertified)  # of the adapter it began with
    otherwise = run is None or config is not None  # nothing says how a bare adapter's base was quantised
    about = require_base(path, partial(base_identity, settings.model), quantised=otherwise, uncertified=uncertified, say=say)
    return Opened(adapter, settings, run, run.adapter if run else path, joined_notes(note, about))


class OpeningOptions(Protocol):
    """The options of a verb that opens an adapter."""

    @property
    def base(self) -> str | None: ...
    @property
    def memory(self) -> str | None: ...
    @property
    def uncertified(self) -> bool: ...


def open_by_options(path: str | Path, options: OpeningOptions, console: Console, *, config: Path | None = None) -> Opened:
    """As `open_adapter`, by a verb's options, which bound the memory too."""
    found = open_adapter(Path(path), base=options.base, config=config, uncertified=options.uncertified, say=console.print)
    return found.within(options.memory)


def require_text_run(path: Path, settings: RunConfig) -> None:
    """Raises ConfigError for a run whose base is no causal language model."""
    kind = settings.declaration
    if not kind.text_model:
        said = f"{path} is a run of kind {kind.name}, which has no text model. {kind.instead}".rstrip()
        raise ConfigError(said, code="kind-lacks", values={"kind": kind.name, "what": "text model"})


def _bare(path: Path, adapter: Adapter, base: str | None) -> RunConfig:
    name = base or adapter.named_base
    if not name:
        raise ConfigError(f"{path} does not name its base model (base_model_name_or_path is empty); name it with --base.")
    return RunConfig(model=ModelSpec(path=name), lora=LoraSpec())

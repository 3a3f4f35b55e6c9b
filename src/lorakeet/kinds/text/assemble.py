"""Assembles a run on text from its settings: rows, model, plan and token ids. Writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Encoded, Encoder, Example
from lorakeet.data.prepare import Dataset, load_dataset
from lorakeet.errors import ConfigError, DataError
from lorakeet.kinds.protocol import Assembly
from lorakeet.kinds.text.continued import earlier_note, read_earlier, require_same_base, start_from
from lorakeet.kinds.text.ranks import choose_ranks, start_directions
from lorakeet.kinds.text.stacked import earlier_facts, start_on_top, with_earlier
from lorakeet.memory.allocator import release_free_memory
from lorakeet.models.files.quantized import packing_divided
from lorakeet.models.modules import outside_text
from lorakeet.models.placement import why_not_cuda
from lorakeet.models.recomputed import recompute_blocks
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import ReadBefore, load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.planning.encoded_rows import EncodedRows
from lorakeet.planning.forecast_text_run import TextRunPlan, measures_rows, reads_weights
from lorakeet.planning.unbound_text_run import fit_text_run
from lorakeet.runs.multi_process import on_own_device
from lorakeet.runs.pruning import cuts_of, pruning_of
from lorakeet.runs.residency import Residency
from lorakeet.train.processes import ALONE, Processes
from lorakeet.train.text.own_code import OwnCodeDifference
from lorakeet.train.text.task import TextTask


@dataclass(frozen=True, kw_only=True)
class TextAssembly(Assembly):
    """What a run on text works with."""

    dataset: Dataset
    text: TextModel
    encoder: Encoder
    train: Encoded
    held_out: Encoded
    test: Encoded
    new_token_ids: tuple[int, ...]
    residency: Residency[TextRunPlan] = field(default_factory=Residency)
    own_code: OwnCodeDifference | None = None  # how the first pass differed from the model's own code; None where not compared
    reference: Any = None  # what a run was compared with, once it is trained, of a kind that has a reference
    halved: bool = False  # whether memory was too small for train.micro_tokens, against the plan
    start_note: str = ""  # that an earlier adapter was not what its certificate was made for

    @property
    def name(self) -> str:
        return self.text.name

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def base_folder(self) -> Path:
        return self.text.source

    @property
    def trained_rows(self) -> int:
        """The rows that are trained on: those that are dropped because they are too long do not count."""
        return len(self.train.examples) // self.config.train.answers

    @property
    def cuts(self) -> dict[int, int]:
        """With ranks.choose prune: the steps after which pairs are cut, and the parameters that are left; else empty."""
        return cuts_of(self.config, self.initial_plan or self.plan, self.steps)

    @property
    def encoded(self) -> dict[str, Encoded]:
        """The token ids of each part of the rows, by its name."""
        return {"training": self.train, "held-out": self.held_out, "test": self.test}

    @property
    def tokens_per_epoch(self) -> int:
        return sum(len(example.ids) for example in self.train.examples)

    @property
    def tokens_of_run(self) -> int:
        """Approximate number of tokens over all steps of the run."""
        rows = self.steps * min(self.config.train.sequences, len(self.train.examples))
        return self.tokens_per_epoch * rows // len(self.train.examples)


def assemble_text(
    config: RunConfig, console: Console, processes: Processes = ALONE, *, members: int = 1, largest: LoraSpec | None = None
) -> TextAssembly:
    """Reads the rows first (quick to fail), then loads the model, then makes plan and ids. Raises ConfigError and DataError.

    `members` and `largest` are for a search: how many adapters train at once, and the pairs of the largest.
    """
    if why := why_not_cuda(config.model.device):
        console.print(why, markup=False, soft_wrap=True)
    config = with_earlier(on_own_device(config, processes))
    start_note = earlier_note(config)
    dataset = load_dataset(config.data, config.train.registered)
    if not dataset.held_out:
        raise DataError(
            "No rows are held out, so nothing could be proved. Set data.held_out_fraction above 0, or name a data.held_out file."
        )
    say = partial(console.print, markup=False, soft_wrap=True)
    rows = EncodedRows(config, (dataset.train, dataset.held_out, dataset.test), dataset.labels, say)
    workload = dataclasses.replace(rows.workload(members), lora=largest)
    residency = fit_text_run(config, say, workload, processes)
    device = config.model.device
    sharded = config.train.shard and processes.count > 1  # a device holds its shard only: the whole model is loaded on the host
    model = dataclasses.replace(config.model, device="cpu") if sharded else config.model
    with packing_divided(processes.rank, processes.count, processes.broadcast):
        text = load_text_model(
            model, say=console.print, store=residency.store, slots=residency.way.slots, pinned=residency.pinned,
            ends=residency.way.ends, before=ReadBefore(tokenizer=rows.tokenizer),
        )  # fmt: skip
    measures = measures_rows(config)
    if text.dtype == torch.float16 and measures:
        raise ConfigError(
            f"model.dtype is float16, and {measures} measures rows without the loss scale that float16 needs. Take ranks.choose "
            "given and lora.start kaiming, or model.dtype float32."
        )
    way = residency.way
    if way.recomputed:
        recompute_blocks(text.model, text.family, keep=way.slots)
    config = resolved(rows.config, text)
    if way.micro_tokens is not None:
        config = config.changed(train={"micro_tokens": way.micro_tokens})
    if sharded:
        config = config.changed(model={"device": device})
    plan = plan_for(text.model, config.lora, text.family)
    if outside := outside_text(text.model):
        say(f"Only the text part of this {text.model.config.model_type} model gets pairs; {', '.join(outside)} stay as they are.")
    new_token_ids = text.add_tokens(config.lora.new_tokens)  # which `rows` added to the tokenizer
    train, held_out, test = rows.parts
    if dataset.labels:
        rows.encoder.candidates(dataset.held_out[0])  # raises now if the template keeps answers from being compared
    if config.ranks.choose == "auto":
        config, plan = choose_ranks(config, text, plan, train.examples, console)
    setup = TextAssembly(
        config=config, plan=plan, dataset=dataset, text=text, encoder=rows.encoder, train=train, held_out=held_out, test=test,
        new_token_ids=new_token_ids, residency=residency, processes=processes, start_note=start_note,
    )  # fmt: skip
    _ = setup.cuts  # raises now if they cannot be made
    return setup


def text_task(
    setup: TextAssembly, *, held_out: Sequence[Example] | None = None, make: Callable[..., TextTask] = TextTask
) -> TextTask:
    """The task that `train` runs; adds the pairs of the plan to the model, initialised from the run's seed.

    `held_out` are the rows that choose the best adapter; by default the run's own. `make` is the class of the task.
    """
    spec = setup.config.train
    text = add_pairs(setup, setup.plan, seed=spec.seed)
    rows = setup.held_out.examples if held_out is None else held_out
    task = make(
        text, setup.train.examples, held_out=rows, spec=spec, spill=setup.residency.spilled_states(text),
        together=setup.residency.way.together,
        processes=setup.processes,
    )  # fmt: skip
    task.pruning = pruning_of(setup.config, text, setup.plan, setup.steps)
    if setup.config.lora.on_top_of is not None:
        task.kept_terms = earlier_facts(setup.config).kept_terms
    return task


def add_pairs(setup: TextAssembly, plan: Plan, *, seed: int, name: str = "default") -> TextModel:
    """Adds the pairs of `plan`, initialised as lora.start says, if need be from training rows. Returns the model to train."""
    directions = start_directions(setup.config, setup.text, plan, setup.train.examples)
    text = initialise_adapter(setup.text, plan, seed=seed, token_ids=setup.new_token_ids, name=name, directions=directions)
    if (earlier := setup.config.lora.continue_from) is not None:
        adapter = read_earlier(setup.config, earlier)
        require_same_base(Path(earlier), adapter, text, setup.config)
        start_from(text, plan, adapter, name)
    if (below := setup.config.lora.on_top_of) is not None:
        adapter = read_earlier(setup.config, below)
        require_same_base(Path(below), adapter, text, setup.config)
        start_on_top(text, plan, adapter, name)
    if directions or reads_weights(setup.config):
        release_free_memory()  # measuring, or a matrix in fp32, leaves freed memory that training has no use for
    return text


def resolved(config: RunConfig, text: TextModel) -> RunConfig:
    """The settings with the dtype, device, attention and products that "auto" became here; a resumed run keeps them."""
    dtype, products = (str(one).removeprefix("torch.") for one in (text.dtype, text.products))
    model = {"dtype": dtype, "device": str(text.device), "attention": text.attention, "products": products}
    return config.changed(model=model)

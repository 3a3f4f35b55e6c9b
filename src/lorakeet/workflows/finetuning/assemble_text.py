"""From a run's settings to everything it works with: rows, model, plan and token ids, checked before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.data.batches import StepOrder
from lorakeet.data.chat import Encoded, Encoder, Example, encode_rows
from lorakeet.data.prepare import Dataset, load_dataset
from lorakeet.data.rows import Row
from lorakeet.errors import ConfigError, DataError
from lorakeet.memory.allocator import give_back_free_memory
from lorakeet.memory.measure import PeakMemory
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapted import begin_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.train.processes import ALONE, Processes
from lorakeet.train.text.task import TextTask
from lorakeet.workflows.finetuning.ranks import choose_ranks, start_directions
from lorakeet.workflows.planning.forecast_choices import reads_weights
from lorakeet.workflows.planning.forecast_text_run import TextRunPlan
from lorakeet.workflows.planning.text_run import Workload, fit_text_run
from lorakeet.workflows.runs.multi_process import on_own_device
from lorakeet.workflows.runs.pruning import cuts_of, pruning_of
from lorakeet.workflows.runs.residency import Residency


@dataclass(frozen=True)
class Assembly:
    """What a run works with. `config` is resolved: nothing in it is "auto" where this machine decided."""

    config: RunConfig
    dataset: Dataset
    text: TextModel
    plan: Plan
    encoder: Encoder
    train: Encoded
    held_out: Encoded
    test: Encoded
    new_token_ids: tuple[int, ...]
    residency: Residency[TextRunPlan] = field(default_factory=Residency)  # how memory.budget is kept
    processes: Processes = ALONE  # that train together
    memory: PeakMemory | None = None  # what the process holds from before the model is loaded on
    begun: Plan | None = None  # once ranks were pruned: the Plan with which training began

    @property
    def cuts(self) -> dict[int, int]:
        """Under ranks.choose prune: after which steps pairs are cut, and to how many parameters; else empty."""
        return cuts_of(self.config, self.begun or self.plan, self.steps)

    @property
    def parted(self) -> bool:
        """Whether the processes part the frozen blocks among themselves."""
        return self.config.train.shard and self.processes.count > 1

    @property
    def judged(self) -> tuple[str, tuple[Row, ...]]:
        """The rows that the verdict is about, and what they are called: the test rows, or else the held-out ones."""
        return ("test", self.dataset.test) if self.dataset.test else ("held-out", self.dataset.held_out)

    @property
    def encoded(self) -> dict[str, Encoded]:
        """The token ids of each part of the rows, by its name."""
        return {"training": self.train, "held-out": self.held_out, "test": self.test}

    @property
    def tokens_per_epoch(self) -> int:
        return sum(len(example.ids) for example in self.train.examples)

    @property
    def tokens_of_run(self) -> int:
        """About as many tokens as all of the run's steps see."""
        rows = self.steps * min(self.config.train.batch_size, len(self.train.examples))
        return self.tokens_per_epoch * rows // len(self.train.examples)

    @property
    def steps(self) -> int:
        order = StepOrder(len(self.train.examples), self.config.train.batch_size, self.config.train.seed)
        return self.config.train.total_steps(order.steps_per_epoch)


def assemble(
    config: RunConfig,
    console: Console,
    processes: Processes = ALONE,
    *,
    members: int = 1,
    largest: LoraSpec | None = None,
) -> Assembly:
    """Rows first (quick to fail), then the model, then the plan and the ids; ConfigError and DataError as they arise.

    A search says how many adapters it has in training at once, and which pairs the largest of them has.
    """
    config = on_own_device(config, processes)
    dataset = load_dataset(config.data)
    if not dataset.held_out:
        raise DataError(
            "No rows are held out, so nothing could be proved; set data.held_out_fraction above 0 or name a data.held_out file."
        )
    parts = (dataset.train, dataset.held_out, dataset.test)
    workload = Workload(bool(dataset.labels), sum(len(row.text) for rows in parts for row in rows), members, largest)
    residency = fit_text_run(config, _say(console), workload)
    place = config.model.device
    parted = config.train.shard and processes.count > 1  # a device has room for a part: the whole is loaded beside it
    model = dataclasses.replace(config.model, device="cpu") if parted else config.model
    text = load_text_model(model, say=console.print, store=residency.store, slots=residency.way.slots, pinned=residency.pinned)
    if text.dtype == torch.float16:
        raise ConfigError(
            "model.dtype is float16, in which models of pictures alone are trained: on text, rates and ranks are tried without a "
            "loss scale, so that small gradients would become 0 without a word. Train with bfloat16 or float32."
        )
    config = within_context(resolved(config, text), text, console)
    if parted:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, device=place))
    plan = plan_for(text.model, config.lora, text.family)
    new_token_ids = text.add_tokens(config.lora.new_tokens)  # before any row is encoded
    encoder = Encoder(text.tokenizer, config.data, dataset.labels)
    train, held_out, test = (encode_rows(rows, encoder) for rows in parts)
    if dataset.labels:
        encoder.candidates(dataset.held_out[0])  # a template that keeps answers from being compared is found now
    if config.ranks.choose == "auto":
        config, plan = choose_ranks(config, text, plan, train.examples, console)
    setup = Assembly(config, dataset, text, plan, encoder, train, held_out, test, new_token_ids, residency, processes)
    _ = setup.cuts  # that cannot be made are refused now
    return setup


def ready_to_train(setup: Assembly, *, held_out: Sequence[Example] | None = None) -> TextTask:
    """The task that `train` runs: the plan's pairs are now in the model, begun from the run's seed.

    `held_out` are the rows to choose the best adapter by: the run's, unless others (or none) are named.
    """
    spec = setup.config.train
    begin_pairs(setup, setup.plan, seed=spec.seed)
    rows = setup.held_out.examples if held_out is None else held_out
    task = TextTask(
        setup.text, setup.train.examples, held_out=rows, spec=spec, aside=setup.residency.spilled_states(),
        together=setup.residency.way.together,
        processes=setup.processes,
    )  # fmt: skip
    task.pruning = pruning_of(setup.config, setup.text, setup.plan, setup.steps)
    return task


def begin_pairs(setup: Assembly, plan: Plan, *, seed: int, name: str = "default") -> None:
    """Puts the pairs of `plan` into the model as the run's settings begin them: lora.start may want a look at training rows."""
    directions = start_directions(setup.config, setup.text, plan, setup.train.examples)
    begin_adapter(setup.text, plan, seed=seed, token_ids=setup.new_token_ids, name=name, directions=directions)
    if directions or reads_weights(setup.config):
        give_back_free_memory()  # what measuring, or a matrix in fp32, grew to is not held beside the steps


def _say(console: Console) -> Callable[[str], None]:
    return partial(console.print, markup=False, soft_wrap=True)


def within_context(config: RunConfig, text: TextModel, console: Console) -> RunConfig:
    """The settings with data.max_tokens no longer than the rows that the model can take; says so where it is."""
    limit, asked = text.context, config.data.max_tokens
    if limit is None or asked <= limit:
        return config
    said = f"data.max_tokens is {asked}, but {text.name} takes rows of at most {limit} tokens; {limit} is used."
    console.print(said, markup=False, soft_wrap=True)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=limit))


def resolved(config: RunConfig, text: TextModel) -> RunConfig:
    """The settings with the dtype, device, attention and products that this machine chose, so that a resumed run keeps them."""
    model = dataclasses.replace(
        config.model,
        dtype=str(text.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        device=str(text.device),
        attention=text.attention,  # type: ignore[arg-type]
        products=str(text.products).removeprefix("torch."),  # type: ignore[arg-type]
    )
    return dataclasses.replace(config, model=model)

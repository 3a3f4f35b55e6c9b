"""A run rehearsed on shapes: the real training step, evaluation and checkpoint, with their tensors entered in a ledger.

Nothing here knows what a layer computes or keeps: the model is built as for a run, one adapter is put in, and `Training.step`
takes a step over it, with the moments of an earlier one. What is planned is what is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack
from lorakeet.memory.ledger import Held, Ledger, Work
from lorakeet.memory.measure import PeakMemory
from lorakeet.models.adapt import begin_adapter
from lorakeet.models.targets import plan_for
from lorakeet.models.text import TextModel, token_logprobs
from lorakeet.quant.adopt import weights_in
from lorakeet.quant.packed import SCRATCH, PackedBase
from lorakeet.train.log import Metrics, Record
from lorakeet.train.loop import Training
from lorakeet.train.progress import Silent
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text_task import TextTask

EVALUATE, STEP, CHECKPOINT = "evaluate", "train step", "checkpoint"
MICRO_BATCHES = 2  # rehearsed in each step: from the second one on gradients are there to be added to


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch: `count` of `length` tokens, the first `prompt` of which are not learnt."""

    length: int
    count: int = 1
    prompt: int = 1

    @property
    def tokens(self) -> int:
        return self.length * self.count


@dataclass(frozen=True)
class Rehearsal:
    """What was held and done. `peaks` in bytes by phase, `base` the frozen model, `work` that of one micro-batch of a step."""

    plan: Plan
    base: int
    peaks: Mapping[str, Held]
    parameters: int  # numbers in the frozen model, packed ones counted one by one
    largest: int  # numbers in its largest matrix
    work: Work = field(default_factory=Work)


def rehearse(
    build: Callable[[], TextModel], lora: LoraSpec, spec: TrainSpec, *, rows: Rows, micro_batches: int = MICRO_BATCHES
) -> Rehearsal:
    """Runs `build` and then held-out evaluation, steps and a checkpoint of its model, on shapes alone.

    `rows` is the largest micro-batch of the run. Raises ConfigError where `lora` does not fit the model.
    """
    SCRATCH.clear()  # a matrix with numbers must not be lent to a rehearsal, nor one without numbers to a run
    try:
        with Ledger() as ledger:
            return _rehearsed(ledger, build, lora, spec, rows=rows, micro_batches=micro_batches)
    finally:
        SCRATCH.clear()


def _rehearsed(
    ledger: Ledger, build: Callable[[], TextModel], lora: LoraSpec, spec: TrainSpec, *, rows: Rows, micro_batches: int
) -> Rehearsal:
    text = build()
    ledger.vocabulary = int(text.model.config.get_text_config().vocab_size)
    ledger.name("base", [*text.model.parameters(), *text.model.buffers()])
    plan = plan_for(text.model, lora, text.family)
    begin_adapter(text, plan, seed=0)
    training = training_on(text, spec, rows, micro_batches)
    parameters = training.parameters.values()
    ledger.name("adapter", [*parameters, *training.task.fixed().values()])
    ledger.watch_gradients(parameters)
    batch = made_up_batch(rows).to(text.device)
    with ledger.phase(EVALUATE):
        text.model.eval()
        token_logprobs(text, batch, chunk=spec.head_chunk)
        best = [parameter.detach().clone() for parameter in parameters]
    ledger.name("adapter", best)
    _begin_moments(training)
    ledger.name("moments", _moments(training))
    with ledger.phase(STEP):
        training.step()
    with ledger.phase(CHECKPOINT):
        _checkpoint(training)
    ledger.close()
    step = ledger.work[STEP]
    work = Work(step.flops // micro_batches, step.written // micro_batches)
    return Rehearsal(plan, ledger.held["base"], ledger.peaks, weights_in(text.model) - plan.parameters, _largest(text), work)


def _largest(text: TextModel) -> int:
    """How many numbers the largest frozen matrix stands for."""
    dense: list[int] = [parameter.numel() for parameter in text.model.parameters() if not parameter.requires_grad]
    packed: list[int] = [math.prod(module.shape) for module in text.model.modules() if isinstance(module, PackedBase)]
    return max([*dense, *packed])


def _checkpoint(training: Training[Any]) -> None:
    """The copies that a checkpoint takes: of the moments, of each of them as bytes, and of these joined to a file."""
    moments = training.optimizer.state()
    parts = [torch.empty(tensor.nbytes, dtype=torch.uint8) for tensor in moments.values()]
    torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8)


def training_on(text: TextModel, spec: TrainSpec, rows: Rows, micro_batches: int = MICRO_BATCHES) -> Training[Any]:
    """A Training of the adapter in `text` on made-up rows, ready to `step`, that writes nothing."""
    examples = [_row(rows, number) for number in range(rows.count * micro_batches)]
    spec = replace(spec, batch_size=len(examples), micro_tokens=rows.tokens)
    training = Training(TextTask(text, examples, held_out=(), spec=spec), spec, run=RunFolder(Path()), report=Silent())
    training.memory, training.metrics = PeakMemory(), _Nowhere()
    training.earlier_seconds = training.started = 0.0
    return training


def made_up_batch(rows: Rows) -> Batch:
    """One micro-batch of such rows."""
    return pack([_row(rows, number) for number in range(rows.count)])


class _Nowhere(Metrics):
    """Metrics that are not written."""

    def __init__(self) -> None:
        self.offset = 0

    def write(self, record: Record) -> None:
        return None


def _row(rows: Rows, number: int) -> Example:
    places = np.arange(rows.length)
    return Example(np.full(rows.length, 3, np.int64), places >= max(1, rows.prompt), str(number), None, False)


def _begin_moments(training: Training[Any]) -> None:
    """AdamW's moments as they are from the second step on."""
    for parameter in training.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step(0.0)


def _moments(training: Training[Any]) -> list[torch.Tensor]:
    return [value for state in training.optimizer.adamw.state.values() for value in state.values()]

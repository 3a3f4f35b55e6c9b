"""The training task of text: a TextModel with one injected adapter, training rows and held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from lorakeet.core.adapter import NAMED_BASE, Adapter
from lorakeet.core.lowrank import LoraPair
from lorakeet.data.batches import StepOrder, distribute_rows
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches, pack_examples
from lorakeet.formats.peft import peft
from lorakeet.memory.spill import Spill
from lorakeet.models import inject
from lorakeet.models.generate.score import row_losses
from lorakeet.models.text.model import TextModel
from lorakeet.train import durable
from lorakeet.train.processes import ALONE, Processes
from lorakeet.train.pruning import Pruning
from lorakeet.train.spec import TrainSpec, learning_rate_for
from lorakeet.train.task import NONE_KEPT, HeldOut, KeptTerms, Size, gradients_by_batch
from lorakeet.train.text.loss import text_loss
from lorakeet.train.text.own_code import OwnCodeDifference
from lorakeet.train.text.streamed_gradients import gradients_by_block


class TextTask:
    """Trains the adapter `name`, which must have been injected into `text.model` and be active.

    With a streamed model, `together` micro-batches (0: all) go through a loaded block, and the inputs of its blocks are stored
    in `spill` (default: where they are).
    The rows of a step, and the held-out rows, are distributed over `processes` by length. With a sharded model
    (models/text/shard), all processes run the same number of micro-batches, and all held-out rows.
    """

    pruning: Pruning | None = None
    kept_terms: KeptTerms = NONE_KEPT
    own_code: OwnCodeDifference | None = None  # of a first pass, where it was compared

    def __init__(
        self,
        text: TextModel,
        train: Sequence[Example],
        *,
        held_out: Sequence[Example],
        spec: TrainSpec,
        name: str = "default",
        spill: Spill | None = None,
        together: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        self.text, self.train, self.spec, self.name = text, list(train), spec, name
        self.processes, self.in_step = processes, spec.shard and processes.count > 1
        self.order = order_of(self.train, spec)
        self.steps_per_epoch, self.dtype = self.order.steps_per_epoch, text.dtype
        self.held_out_rows = list(held_out)
        self.spill, self.together = spill or Spill(), together

    @property
    def learning_rate(self) -> float:
        return learning_rate_of(self.text)

    def parameters(self) -> dict[str, Parameter]:
        return inject.trained_parameters(self.text.model, self.name)

    def fixed(self) -> dict[str, Tensor]:
        return {
            f"{path.replace('.original.', '.')}.{key}": buffer  # the same name whatever stands for a block
            for path, module in self.text.model.named_modules()
            if isinstance(module, LoraPair) and f".adapters.{self.name}." in f"{path}."
            for key, buffer in module.named_buffers(recurse=False)
        }

    def batches(self, step: int) -> list[Batch]:
        rows = self.step_rows(step)
        return self.text.micro_batches([rows[number] for number in self._own(rows)], self.spec.micro_tokens)

    def step_rows(self, step: int) -> list[Example]:
        """The rows of step `step`, counted from 0, with every answer of each."""
        return [self.train[row] for row in self.order.indices(step)]

    def joinable(self, step: int) -> list[Batch]:
        """The micro-batches of a small step, which computes every token of its own, so that those of others can join."""
        return micro_batches(self.step_rows(step), self.spec.micro_tokens)

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """What must be known before the gradients of a step, by the model as it is."""

    def loss_of(self, batch: Batch, losses: Tensor) -> Tensor:
        """The loss of a batch, with gradient, from −log p of each of its targets (targets,), in their order."""
        return losses.sum()

    def _own(self, rows: Sequence[Example]) -> Sequence[int]:
        """The numbers of the rows of this process."""
        if self.processes.count == 1:
            return range(len(rows))
        return distribute_rows([len(row.ids) for row in rows], self.processes.count)[self.processes.rank]

    def size(self, batch: Batch) -> Size:
        return Size(rows=len(batch.lengths), tokens=batch.tokens, targets=batch.targets)

    def gradients(self, batches: Sequence[Batch], targets: float) -> Tensor:
        streamed = self.text.streamed
        if streamed is not None:
            self.text.train()
            return gradients_by_block(
                self.text, streamed, batches, targets, spill=self.spill, chunk=self.spec.head_chunk, together=self.together
            )
        with self.processes.own_random():
            idle = self.processes.maximum(len(batches)) - len(batches) if self.in_step else 0  # exchanged before any forward pass
            with self._passing():
                total = gradients_by_batch(self.loss, batches, targets)
                if idle:
                    gradients_by_batch(lambda batch: 0 * self.loss(batch), [self.idle_batch] * idle, targets)
        return total

    def _passing(self) -> AbstractContextManager[None]:
        return self.processes.gathering() if self.in_step else nullcontext()

    @cached_property
    def idle_batch(self) -> Batch:
        """The micro-batch of a process while others have more of them: the shortest row."""
        return pack_examples([min((row for row in self.train if row.supervised.any()), key=lambda row: len(row.ids))])

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the loss over the batch's targets, with gradient, in training mode."""
        self.text.train()
        return text_loss(self.text, batch.to(self.text.device), chunk=self.spec.head_chunk)[0]

    def held_out(self) -> HeldOut | None:
        return HeldOut(*self.losses_of(self.held_out_rows)) if self.held_out_rows else None

    def losses_of(self, rows: Sequence[Example]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """−Σ log p over the targets of each row (rows,) and their number (rows,), equal in every process."""
        spec = self.spec
        own = list(range(len(rows)) if self.in_step else self._own(rows))
        with self._passing():
            found = row_losses(
                self.text, [rows[number] for number in own], micro_tokens=spec.micro_tokens, chunk=spec.head_chunk
            )
        if self.processes.count == 1:
            return found
        if self.in_step:  # all have all rows, but machines may round differently, and all must decide equally
            same = torch.from_numpy(np.stack(found))
            self.processes.broadcast([same])
            sums, weights = same.numpy()
            return sums, weights
        whole = np.zeros((2, len(rows)))
        whole[:, own] = found
        sums, weights = self.processes.summed(torch.from_numpy(whole)).numpy()  # each row comes from one process
        return sums, weights

    def halve(self) -> str:
        shortest = min((len(row.ids) for row in self.train), default=0)
        tokens = self.spec.micro_tokens // 2
        if tokens < shortest:  # every row is a micro-batch of its own already
            return ""
        self.spill.clear()  # of inputs of blocks that no backward pass has taken
        self.spec = replace(self.spec, micro_tokens=tokens)
        return f"train.micro_tokens {tokens}"

    def adapter(self) -> Adapter:
        """The adapter's current value."""
        named, loadable = self.text.name, self.text.loadable_name
        found = inject.adapter_of(self.text.model, self.name, base=loadable)
        return found if loadable == named else replace(found, metadata={**found.metadata, NAMED_BASE: named})

    def save(self, folder: Path) -> None:
        """Writes adapter/ in PEFT's layout, with the tokenizer if the run added tokens."""
        adapter = self.adapter()
        peft.write(adapter, folder)
        if any(rows.tokens for rows in adapter.token_rows.values()):
            with durable.as_os_error():
                self.text.tokenizer.save_pretrained(folder)


def order_of(rows: Sequence[Example], spec: TrainSpec) -> StepOrder:
    """The order of `rows`; steps have rows of similar length if `spec.length_grouping`."""
    lengths = tuple(len(example.ids) for example in rows) if spec.length_grouping else None
    return StepOrder(len(rows), spec.batch_size, spec.seed, lengths)


def learning_rate_of(text: TextModel) -> float:
    """The default learning rate for this model."""
    return learning_rate_for(int(text.model.config.get_text_config().hidden_size), text.family.rate_exponent)

"""Gradients of a streamed text model: all micro-batches of a step go through a block while it is loaded.

    forward   block 0 … n−1    stores only the block's input of each batch
    head      the loss of each batch, and ∂loss/∂(output of block n−1); a head that comes to a GPU is read once for all
    backward  block n−1 … 0    recomputes the block with gradients and differentiates it; its weights are loaded once

The operations are those of a resident model, and each parameter's gradients are summed in the same order of batches, so results
are equal to the last bit. Only the order of blocks differs, which affects no sum. A head that is read once sums in another order
(models/text/tiled_loss): results are then equal but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from lorakeet.data.pack import Batch
from lorakeet.memory.spill import Spill
from lorakeet.models import modules
from lorakeet.models.streaming.model import BlockInputs, StreamedBlocks, plain_output
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.tiled_loss import is_read_in_tiles, tiled_losses
from lorakeet.train import rng
from lorakeet.train.task import batch_seeds
from lorakeet.train.text.loss import text_loss

Losses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # hidden states and targets to the losses and ∂(their sum)/∂(states)


def gradients_by_block(
    text: TextModel,
    streamed: StreamedBlocks,
    batches: Sequence[Batch],
    targets: float,
    *,
    spill: Spill,
    chunk: int,
    together: int = 0,
) -> Tensor:
    """Adds ∂(Σ losses / targets) to the gradients of the trained parameters; returns Σ losses, fp64, detached.

    `spill` stores the inputs of blocks until the backward pass; `chunk` target tokens go through the head at once.
    At most `together` micro-batches (0: all) go through a loaded block; more cost more memory.
    """

    def loss(number: int) -> tuple[Tensor, Tensor]:
        found, _ = text_loss(text, here[number], chunk=chunk)
        return found / targets, found.detach()

    def of_all(hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        states = hidden.to(weight.dtype)  # type: ignore[union-attr]
        found, grad = tiled_losses(states, weight, wanted, chunk=chunk)  # type: ignore[arg-type]
        factor = torch.full((), 1 / targets, dtype=states.dtype, device=states.device)  # rounded as autograd does
        return found, (cast(Tensor, grad) * factor).to(hidden.dtype)

    here, weight = [batch.to(text.device) for batch in batches], text.head_weight
    at_once = of_all if is_read_in_tiles(weight, text.device) else None
    return loss_gradients_by_block(text, streamed, here, loss, spill=spill, together=together, at_once=at_once)


def loss_gradients_by_block(
    text: TextModel,
    streamed: StreamedBlocks,
    batches: Sequence[Batch],
    loss: Callable[[int], tuple[Tensor, Tensor]],
    *,
    spill: Spill,
    together: int = 0,
    prepare: Callable[[int], TextModel] | None = None,
    at_once: Losses | None = None,
) -> Tensor:
    """The same for any loss: `loss(number)` returns the values of batch `number` to differentiate and to sum.

    `prepare(number)` is called before each use of the batch; it selects the adapters of its tokens and returns the model with
    the batch's options (`text` if left out). `at_once` is the loss of several batches' targets, where that is cheaper.
    """
    total = torch.zeros((), dtype=torch.float64, device=text.device)
    seeds, size = batch_seeds(len(batches)), together or max(1, len(batches))
    for start in range(0, len(batches), size):
        part = slice(start, start + size)
        step = _Step(text, streamed, list(batches[part]), seeds[part], spill)
        step.prepare = lambda number, start=start: text if prepare is None else prepare(start + number)  # type: ignore[misc]
        step.loss = lambda number, start=start: loss(start + number)  # type: ignore[misc]
        step.at_once = at_once
        step.enter()
        step.forward()
        total = step.head(total)
        step.backward()
    return total


class _Step:
    """The state of one optimizer step's micro-batches."""

    prepare: Callable[[int], TextModel]
    loss: Callable[[int], tuple[Tensor, Tensor]]
    at_once: Losses | None = None

    def __init__(self, text: TextModel, streamed: StreamedBlocks, batches: list[Batch], seeds: list[int], spill: Spill) -> None:
        self.text, self.streamed, self.batches, self.spill = text, streamed, batches, spill
        draws = modules.draws_numbers(text.model)
        self.random = [_Random(seed, text.device, draws=draws) for seed in seeds]
        self.passages: list[BlockInputs] = []
        self.states: list[Tensor] = []  # outputs of the latest block; in the backward pass their gradients
        self.outer: list[dict[nn.Parameter, Tensor]] = []  # by batch: gradients outside the blocks, from the head
        self.parameters = [parameter for parameter in text.model.parameters() if parameter.requires_grad]
        trained = (block for block in streamed.blocks if any(parameter.requires_grad for parameter in block.parameters()))
        self.lowest = next((block.index for block in trained), len(streamed.blocks))

    def enter(self) -> None:
        """Computes the embeddings of each batch, and records the arguments of the blocks."""
        for number, (batch, random) in enumerate(zip(self.batches, self.random, strict=True)):
            text = self.prepare(number)
            with random.drawing(), self.streamed.recording() as passage:
                text.hidden(batch)
            self.passages.append(passage)
            self.states.append(cast(Tensor, passage.entry).detach())
        if self._trains_entry:
            self.lowest = 0

    @property
    def _trains_entry(self) -> bool:
        return any(cast(Tensor, passage.entry).requires_grad for passage in self.passages)

    def forward(self) -> None:
        """Runs all batches through all blocks without gradients."""
        last = len(self.streamed.blocks) - 1
        for index in range(last + 1):
            with self.streamed.present(index, min(index + 1, last)) as block, torch.no_grad():
                for number, random in enumerate(self.random):
                    text = self.prepare(number)
                    if index >= self.lowest:
                        self.spill.put((index, number), self.states[number])
                    with random.drawing(keep_for=index), self._narrowed(text, index, number):
                        args, kwargs = self.passages[number].arguments[index]
                        self.states[number] = plain_output(block(self.states[number], *args, **kwargs))

    def head(self, total: Tensor) -> Tensor:
        """Returns `total` plus the losses; sets `states` to their gradients with respect to the last block's outputs."""
        if self.at_once is not None and not self._trains_entry and self.lowest < len(self.streamed.blocks):
            return self._head_at_once(total, self.at_once)
        before = self._taken_gradients() if self._trains_entry else {}
        for number, random in enumerate(self.random):
            self.prepare(number)
            leaf = self.states[number].requires_grad_(self.lowest < len(self.streamed.blocks))
            with random.drawing(), self.streamed.replaying(leaf):
                loss, summed = self.loss(number)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + summed.double()
            self.states[number] = cast(Tensor, leaf.grad)
            del leaf, loss
            if self._trains_entry:
                self.outer.append(self._taken_gradients())
        for parameter, grad in before.items():
            parameter.grad = grad
        return total

    def _head_at_once(self, total: Tensor, losses: Losses) -> Tensor:
        """`head` by one pass over the head for all batches."""
        hidden = []
        for number, random in enumerate(self.random):
            text = self.prepare(number)
            with random.drawing(), self.streamed.replaying(self.states[number].requires_grad_()):
                hidden.append(text.hidden(self.batches[number]))
        with torch.no_grad():
            found, grads = losses(torch.cat(hidden), torch.cat([batch.target_ids for batch in self.batches]))
        sizes = [batch.targets for batch in self.batches]
        for number, (own, grad) in enumerate(zip(found.split(sizes), grads.split(sizes), strict=True)):  # type: ignore[no-untyped-call]
            hidden[number].backward(grad)  # type: ignore[no-untyped-call]
            total = total + own.sum().double()
            self.states[number] = cast(Tensor, self.states[number].grad)
        return total

    def backward(self) -> None:
        """Runs backward of all batches through the trained blocks, and into trained embeddings."""
        for index in reversed(range(self.lowest, len(self.streamed.blocks))):
            with self.streamed.present(index, max(index - 1, 0)) as block:
                for number, random in enumerate(self.random):
                    text = self.prepare(number)
                    states = self.spill.take((index, number), self._next(index, number)).detach()
                    states.requires_grad_(index > self.lowest or self._trains_entry)
                    with random.again(index), torch.enable_grad(), self._narrowed(text, index, number):
                        args, kwargs = self.passages[number].arguments[index]
                        output = plain_output(block(states, *args, **kwargs))
                    torch.autograd.backward(output, self.states[number])
                    self.states[number] = cast(Tensor, states.grad)
                    del states, output
        if self._trains_entry:
            self._into_entry()

    def _next(self, index: int, number: int) -> tuple[int, int] | None:
        """The block and batch whose input is wanted after that of block `index` and batch `number`; None at the end."""
        if number + 1 < len(self.batches):
            return index, number + 1
        return (index - 1, 0) if index > self.lowest else None

    def _narrowed(self, text: TextModel, index: int, number: int) -> AbstractContextManager[None]:
        """A context in which the last block computes only what the loss of batch `number` reads, as in a resident model."""
        last = index == len(self.streamed.blocks) - 1 and text.attention == "varlen"
        return text.narrowing_last_block(text.layout(self.batches[number])) if last else nullcontext()

    def _into_entry(self) -> None:
        """Adds gradients of trained embeddings. A weight shared by head and embedding is summed within a batch first, as in
        autograd.
        """
        totals = self._taken_gradients()  # of the blocks, and of earlier batches
        for passage, grad, from_head in zip(self.passages, self.states, self.outer, strict=True):
            torch.autograd.backward(cast(Tensor, passage.entry), grad)
            found = self._taken_gradients()
            for parameter in {**from_head, **found}:
                parts = [part[parameter] for part in (from_head, found) if parameter in part]
                of_batch = parts[0] if len(parts) == 1 else parts[0] + parts[1]
                totals[parameter] = of_batch if parameter not in totals else totals[parameter] + of_batch
        for parameter, total in totals.items():
            parameter.grad = total

    def _taken_gradients(self) -> dict[nn.Parameter, Tensor]:
        """Removes the gradients from the parameters and returns them."""
        found = {parameter: parameter.grad for parameter in self.parameters if parameter.grad is not None}
        for parameter in found:
            parameter.grad = None
        return found


class _Random:
    """The random state of one micro-batch on CPU and device: continues from block to block, and is replayed in backward.

    Nothing is saved or restored for a model that `draws` no numbers.
    """

    def __init__(self, seed: int, device: torch.device, *, draws: bool = True) -> None:
        self.device, self.draws, self._state = device, draws, rng.seeded(seed, device) if draws else ()
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    @contextmanager
    def drawing(self, keep_for: int | None = None) -> Iterator[None]:
        """A context with this micro-batch's random state; stores the state at block `keep_for`."""
        if not self.draws:
            yield
            return
        if keep_for is not None:
            self._kept[keep_for] = self._state
        with torch.random.fork_rng(devices=rng.cuda_devices(self.device)):
            rng.draw_from(self._state, self.device)
            yield
            self._state = rng.drawn(self.device)

    @contextmanager
    def again(self, index: int) -> Iterator[None]:
        """A context that replays the random numbers of block `index`."""
        if not self.draws:
            yield
            return
        with torch.random.fork_rng(devices=rng.cuda_devices(self.device)):
            rng.draw_from(self._kept.pop(index), self.device)
            yield

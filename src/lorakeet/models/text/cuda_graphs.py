"""Both passes of a decoder, recorded once for each shape of micro-batch and replayed: one launch where there were thousands.

A host takes some microseconds to launch an operation on a card, and a small model asks for so many of them that the card waits. A
CUDA graph is the operations of a pass with the addresses that they work on, launched as one. So all that differs from one
micro-batch to the next lies at addresses that stay: tokens, their positions, and where rows begin
(core/fused/flash_varlen_recorded); and the adapter's numbers, which the optimizer writes where they are.

    Shape      tokens, filled up to one of 8 counts between two powers of two; rows, to a power of two; the longest one
    hidden     fills the places, replays the forward pass; its result is a leaf of autograd's graph
    backward   the gradient of that, laid where the recorded pass looks for it, is replayed and adds to those of the adapter

The output head, whose work depends on how many tokens are learnt, is outside. Rows share no beginning here, and the last block
computes all tokens. What was recorded, on made-up rows, is proved before it counts: with the adapter's numbers moved a little, a
micro-batch must have the hidden states and the gradients that the model gives it. **Not run on a GPU yet**: the tests record on a
CPU, operation by operation, and see nothing of a card's streams and pools.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from lorakeet.core.fused.flash_varlen_recorded import RowOffsets
from lorakeet.core.scratch import SCRATCH
from lorakeet.core.tiled_product import RowSource
from lorakeet.data.pack import Batch, to_device
from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels.tiled_weight import Kernels
from lorakeet.models.text.batch_shape import BatchShape
from lorakeet.models.text.model import TextModel

SETTING = "train.cuda_graphs"
TURN_OFF = f"Set {SETTING} to false (for a run that has begun: in its config.yaml, and resume it)"
REMEDY = f"{TURN_OFF}, and please report it."
WARM = 2  # times that both passes run before they are recorded: libraries set themselves up in the first
MOVED = 1e-2  # standard deviation of what is added to the adapter's numbers for the proof
FAR = 0.1  # of the length of a gradient, or of hidden states: beyond the rounding of bf16 in another order
FAR_TOKEN = 0.3  # of the length of a token's: of one row among many all of them tell nothing
SILENT = 1e-3  # of the longest gradient's length: of a shorter one rounding is all that there may be
SAID = 300  # characters of what torch says
ResultT = TypeVar("ResultT")


class Recorder(Protocol):
    """Records what is computed, so that it can be computed again by one call, with the numbers that are there then."""

    def warm(self, passes: Callable[[], ResultT]) -> ResultT:
        """Computes it as it will be recorded, and records nothing."""
        ...

    def record(self, passes: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        """What computes it again, into the same tensors; and these."""
        ...


class CudaGraphs:
    """Recorded as CUDA graphs. All share one pool of memory: what a recording no longer needs, the next one may take, so no two
    may be under way at once. And one stream, whose workspaces of cuBLAS are there once it is warm."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm(self, passes: Callable[[], ResultT]) -> ResultT:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = passes()
        current.wait_stream(self.stream)
        return result

    def record(self, passes: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = passes()
        return graph.replay, result


@dataclass(frozen=True)
class RecordedGraphs:
    """A shape's two passes: what replays them."""

    tokens: int
    forward: Callable[[], None]
    backward: Callable[[], None]
    scratch: tuple[Tensor, ...]  # buffers beside its own that it writes to; let go, they would be somebody else's


class ReplayedPasses:
    """A TextModel as train/text/loss asks for it, whose decoder is replayed; gradients are added to those of `parameters`.

    `room`: a shape with room for any micro-batch that comes. `record_first` records before training begins. Whoever has computed
    a micro-batch lets go of its loss before the next one comes (train/task.gradients_by_batch): a recording would meet, in a
    graph of autograd that is left, the stream of that one.
    """

    def __init__(self, text: TextModel, parameters: Mapping[str, Parameter], recorder: Recorder, room: BatchShape) -> None:
        self.text, self.recorder, self.room = text, recorder, room
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.recorded: dict[BatchShape, RecordedGraphs | None] = {}  # None: the model computes micro-batches of this shape
        self.ids, self.positions = (torch.zeros(room.tokens, dtype=torch.int64, device=text.device) for _ in range(2))
        self.starts = torch.zeros(room.rows + 1, dtype=torch.int32, device=text.device)
        self.sums: list[Tensor | None] = []  # of gradients, the parameters' own; None where nothing recorded depends on one
        self.states = self.upstream = torch.empty(0)  # (room's tokens, hidden), once it is known how wide
        self.turn = 0  # counts passes: of which hidden states there is no backward pass any more
        self.anchor = torch.zeros((), requires_grad=True)

    @property
    def head_weight(self) -> RowSource | None:
        return self.text.head_weight

    @property
    def kernels(self) -> Kernels | None:
        return self.text.kernels

    def head(self, hidden: Tensor) -> Tensor:
        """(n, hidden) to logits, as the model does."""
        return self.text.head(hidden)

    def hidden(self, batch: Batch) -> Tensor:
        """The decoder's last hidden states where a target is to be predicted, (targets, hidden), with gradient.

        They stand until the next micro-batch, which may come after their backward pass.
        """
        shape = BatchShape.of(batch.lengths, self.room.longest)
        if shape not in self.recorded:
            self.recorded[shape] = self._proved(shape, batch)
        recorded = self.recorded[shape]
        return self.text.hidden(batch) if recorded is None else self._replayed(recorded, shape, batch)

    def record_first(self, batch: Batch) -> None:
        """Records the shape of `batch`, which should be the largest: others find room in what memory it leaves.

        Raises EnvironmentProblem where it cannot be recorded or is not proved.
        """
        shape = BatchShape.of(batch.lengths, self.room.longest)
        self.recorded[shape], said = self._recorded_and_compared(shape, batch)
        if said:
            raise EnvironmentProblem(f"{SETTING} is true, but {said}. {REMEDY}")

    def _proved(self, shape: BatchShape, batch: Batch) -> RecordedGraphs | None:
        """The passes of a shape that first comes in training; None where they are not proved, which is said."""
        recorded, said = self._recorded_and_compared(shape, batch)
        if said:
            logging.getLogger("lorakeet").warning(
                "%s: %s. Micro-batches of this shape are computed without being recorded. Please report it.", SETTING, said
            )
            return None
        return recorded

    def _recorded_and_compared(self, shape: BatchShape, batch: Batch) -> tuple[RecordedGraphs, str]:
        """The passes, and in words how they differ from the model's. EnvironmentProblem where they cannot be recorded."""
        if shape.tokens > self.room.tokens or shape.rows > self.room.rows:
            raise ValueError(f"there is room for {self.room}, and {shape} came")
        with _said_as_environment(), _without_gradients(self.parameters):
            recorded = self._record(shape, batch.lengths)
            return recorded, self._difference(shape, recorded, batch)

    def _record(self, shape: BatchShape, lengths: Sequence[int]) -> RecordedGraphs:
        """Both passes of `shape`, recorded on other numbers than those that come: what is kept of them shows in the proof."""
        self._fill(shape.unlike(lengths), self.ids.new_zeros(shape.tokens))
        self.positions.zero_()
        places = RowOffsets(self.starts[: shape.rows + 1], min(shape.longest, shape.tokens))
        self.text.learn()
        with torch.enable_grad():
            return self._warmed_and_recorded(self.ids[: shape.tokens], self.positions[: shape.tokens], places)

    def _warmed_and_recorded(self, *given: Any) -> RecordedGraphs:
        """Both passes over tokens, positions and places that lie where they are `given`."""
        decoded, parameters, tokens = self.text.placed_states, self.parameters, len(given[0])

        def both() -> tuple[Tensor, list[bool]]:
            out = decoded(*given)
            if not out.requires_grad:
                raise EnvironmentProblem(f"{SETTING} is true, but nothing is trained below the output head. {TURN_OFF}.")
            found = torch.autograd.grad(out, parameters, torch.zeros_like(out), allow_unused=True)
            return out.detach(), [grad is not None for grad in found]

        for _ in range(WARM):
            out, used = self.recorder.warm(both)
        if not self.sums:
            self.states, self.upstream = (out.new_zeros(self.room.tokens, out.shape[1]) for _ in range(2))
            self.sums = [torch.zeros_like(own) if wanted else None for own, wanted in zip(parameters, used, strict=True)]
        states, upstream, sums = self.states[:tokens], self.upstream[:tokens], self.sums

        def forward() -> Tensor:
            out = decoded(*given)
            states.copy_(out.detach())
            return out

        replay_forward, out = self.recorder.record(forward)

        def backward() -> None:
            found = torch.autograd.grad(out, parameters, upstream, allow_unused=True)
            pairs = [(total, grad) for total, grad in zip(sums, found, strict=True) if total is not None and grad is not None]
            torch._foreach_add_([total for total, _ in pairs], [grad for _, grad in pairs])

        replay_backward, _ = self.recorder.record(backward)
        return RecordedGraphs(tokens, replay_forward, replay_backward, SCRATCH.held())

    def _fill(self, rows: Sequence[int], ids: Tensor) -> None:
        """Lays tokens, positions and places where the recorded passes look for them. `rows`: tokens of every place."""
        positions = np.concatenate([np.arange(length) for length in rows])
        starts = np.cumsum([0, *rows], dtype=np.int32)
        self.ids[: len(ids)].copy_(ids)
        self.ids[len(ids) : len(positions)].zero_()
        for places, numbers in ((self.positions, positions), (self.starts, starts)):
            places[: len(numbers)].copy_(to_device(torch.from_numpy(numbers), places.device))

    def _replayed(self, recorded: RecordedGraphs, shape: BatchShape, batch: Batch) -> Tensor:
        self._fill(shape.rows_of(batch.lengths), batch.ids)
        states: Tensor = _Replay.apply(self.anchor, self, recorded)  # type: ignore[no-untyped-call]
        return states.index_select(0, batch.target_positions.to(states.device))

    def lay_gradients(self) -> None:
        """Lets the parameters' gradients lie where a recorded pass adds to them: nothing yet, or what others have added."""
        fresh, others = [], []
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            own = parameter.grad
            if total is None or own is total:
                continue
            if own is None:
                fresh.append(total)
            else:
                others.append((total, own))
            parameter.grad = total
        if fresh:
            torch._foreach_zero_(fresh)
        if others:
            torch._foreach_copy_([total for total, _ in others], [own for _, own in others])

    def _difference(self, shape: BatchShape, recorded: RecordedGraphs, batch: Batch) -> str:
        """In words, how the recorded passes differ from the model's by more than rounding; empty where they do not."""
        batch = batch.to(self.text.device)
        with torch.enable_grad(), _moved(self.parameters):
            hidden = self.text.hidden(batch)
            upstream = _numbers(hidden, seed=shape.tokens)
            theirs = torch.autograd.grad(hidden, self.parameters, upstream, allow_unused=True)
            found = self._replayed(recorded, shape, batch)
            found.backward(upstream)  # type: ignore[no-untyped-call]
            mine = [parameter.grad for parameter in self.parameters]
            grads = {}
            for name, one, other in zip(self.names, mine, theirs, strict=True):
                if (one is None) != (other is None):
                    return f"recorded passes have another gradient of {name} than the model: one of them has none"
                if one is not None and other is not None:
                    grads[f"the gradient of {name}"] = one, other
            states = found.detach(), hidden.detach()
            return _far({"hidden states": states}) or _far_token(*states) or _far(grads)


class _Replay(torch.autograd.Function):
    """A recorded decoder as a function of autograd. All that it reads and gives lies where it was recorded; the anchor is there
    because autograd asks for a backward pass only where something that was given wants a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: ReplayedPasses, recorded: RecordedGraphs) -> Tensor:
        passes.turn += 1
        ctx.passes, ctx.recorded, ctx.turn = passes, recorded, passes.turn
        recorded.forward()
        return passes.states[: recorded.tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        passes: ReplayedPasses = ctx.passes
        if ctx.turn != passes.turn:
            raise RuntimeError("another micro-batch was replayed between the two passes of this one, over what it had kept")
        passes.turn += 1
        passes.upstream[: ctx.recorded.tokens].copy_(grad)
        passes.lay_gradients()
        ctx.recorded.backward()
        return None, None, None


@contextmanager
def _moved(parameters: Sequence[Parameter]) -> Iterator[None]:
    """A context in which all numbers of the adapter are others, a little: at its start half of them would get no gradient."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.add_(_numbers(parameter, seed=number), alpha=MOVED)
        yield
    finally:
        with torch.no_grad():
            for parameter, own in zip(parameters, before, strict=True):
                parameter.copy_(own)


@contextmanager
def _without_gradients(parameters: Sequence[Parameter]) -> Iterator[None]:
    """A context in which no gradients are there yet; those that were are there again behind it, with their numbers."""
    before = [(parameter.grad, None if parameter.grad is None else parameter.grad.clone()) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, (grad, numbers) in zip(parameters, before, strict=True):
            parameter.grad = grad
            if grad is not None and numbers is not None:
                grad.copy_(numbers)


def _numbers(like: Tensor, *, seed: int) -> Tensor:
    """Normal numbers in the shape, dtype and place of `like`, the same on every machine."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


@contextmanager
def _said_as_environment() -> Iterator[None]:
    """A context in which what torch raises where it cannot record, or has no memory for it, is said with what helps."""
    try:
        yield
    except RuntimeError as error:
        causes = _causes(error)
        for cause in causes:
            if not isinstance(cause, Exception):  # Ctrl-C, whose recording could not be ended in order either
                raise cause from None
        if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
            raise EnvironmentProblem(
                f"{SETTING} is true, and memory is out: recorded passes and, to prove them, the model's own are held at once. "
                f"Lower train.micro_tokens. Or: {TURN_OFF}."
            ) from error
        first = [cause for cause in causes if isinstance(cause, RuntimeError)][-1]
        said = " ".join(str(first).split())[:SAID].rstrip(".")
        raise EnvironmentProblem(f"{SETTING} is true, but the passes cannot be recorded: {said}. {REMEDY}") from error


def _causes(error: BaseException) -> list[BaseException]:
    """What was raised, the first last: where a recording fails, its end fails too, and says less."""
    found = [error]
    while (link := found[-1].__context__) is not None:
        found.append(link)
    return found


def _far(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """In words, which pair of tensors is farther apart than rounding explains; empty where none is."""
    lengths = torch.stack([torch.stack([(a.float() - b.float()).norm(), b.float().norm()]) for a, b in pairs.values()])
    return _said(list(pairs), lengths, FAR)


def _far_token(mine: Tensor, theirs: Tensor) -> str:
    """The same of hidden states (targets, hidden), each token's by itself."""
    lengths = torch.stack([(mine.float() - theirs.float()).norm(dim=1), theirs.float().norm(dim=1)], 1)
    return _said([f"hidden states of target {number}" for number in range(len(mine))], lengths, FAR_TOKEN)


def _said(names: Sequence[str], lengths: Tensor, far: float) -> str:
    """`lengths`: of each difference, and of what it is compared with (n, 2)."""
    least = SILENT * lengths[:, 1].max().item()
    for name, (apart, length) in zip(names, lengths.tolist(), strict=True):
        allowed = far * max(length, least)
        if not apart <= allowed:
            return f"{name} of recorded passes and of the model are {apart:.3g} apart, where rounding explains {allowed:.3g}"
    return ""

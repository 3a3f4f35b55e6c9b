"""CUDA graphs of a decoder's forward and backward pass, one pair for each shape of micro-batch: one launch instead of thousands.

The host takes some microseconds to launch an operation on a GPU, and a small model has so many that the GPU waits. A CUDA graph
is the operations of a pass with their addresses, launched as one. So everything that differs between micro-batches lies in fixed
buffers: tokens, positions and row offsets (kernels/flash_varlen). The optimizer updates the adapter in place.

    BatchShape  tokens, padded to one of 8 counts between two powers of two; rows, to a power of two; the longest row
    hidden      fills the buffers and replays the forward graph; the result is a leaf of autograd's graph
    backward    copies the gradient into its buffer and replays the backward graph, which adds to the adapter's gradients

The output head is left out: its work depends on the number of target tokens. Rows share no prefix here, and the last block
computes all tokens. A graph is recorded on made-up rows and verified before use: with a slightly changed adapter it must give
the hidden states and gradients of the model. **Not run on a GPU yet**: the tests record on a CPU, operation by operation, and
cover neither streams nor memory pools.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from lorakeet.core.gpu_pairs import fresh_copies
from lorakeet.core.scratch import SCRATCH
from lorakeet.core.tiled_product import RowSource
from lorakeet.data.pack import Batch
from lorakeet.errors import EnvironmentProblem, is_out_of_memory
from lorakeet.kernels.flash_varlen import RowOffsets
from lorakeet.kernels.host_copies import to_device
from lorakeet.kernels.nf4_maxima import LAST
from lorakeet.memory.cuda import release_device_memory
from lorakeet.models.text.model import COUNTS, MULTIPLE, TextModel, padded_count

SETTING = "train.cuda_graphs"
TURN_OFF = f"Set {SETTING} to false (for a run that has started: in its config.yaml, and resume it)"
REMEDY = f"{TURN_OFF}, and please report it."
WARM_UPS = 2  # runs of both passes before they are recorded: libraries initialise themselves in the first
PERTURBATION = 1e-2  # standard deviation of the noise added to the adapter for the check
TOLERANCE = 0.1  # of the norm of a gradient or of the hidden states: more than bf16 rounding in another order
TOKEN_TOLERANCE = 0.3  # of the norm of one token's states: one wrong row among many hardly changes the norm of all
NEGLIGIBLE = 1e-3  # of the largest gradient's norm: a smaller one may be rounding alone
MOST_SHAPES = 32  # that are recorded: a driver keeps some memory for each graph
ERROR_LENGTH = 300  # characters of torch's error message that are shown
ResultT = TypeVar("ResultT")


class NotRecorded(EnvironmentProblem):
    """Passes cannot be recorded, or compute something else. The message is for a run that asked; `reason` is a part of it.
    `to_report`: whether it may be a mistake of Lorakeet; too little memory is none.
    """

    def __init__(self, reason: str, remedy: str = REMEDY) -> None:
        super().__init__(f"{SETTING} is true, but {reason}. {remedy}")
        self.reason, self.to_report = reason, remedy == REMEDY


@dataclass(frozen=True)
class BatchShape:
    """The shape of the micro-batches that one recording can compute."""

    tokens: int  # padding included
    rows: int  # padding rows included; some may have no token
    longest: int  # the most tokens of a row

    @classmethod
    def of(cls, lengths: Sequence[int], longest: int) -> BatchShape:
        """The shape for rows of these lengths, none above `longest`."""
        tokens = padded_count(sum(lengths), few_counts=True)
        return cls(tokens, _power_of_two(len(lengths) + -(-(tokens - sum(lengths)) // longest)), longest)

    @classmethod
    def largest(cls, longest: int, micro_tokens: int, rows: int) -> BatchShape:
        """A shape that fits any micro-batch of at most `rows` rows and `micro_tokens` tokens, or of one longer row."""
        tokens = padded_count(max(longest, micro_tokens), few_counts=True)
        return cls(tokens, _power_of_two(rows + -(-max(MULTIPLE, tokens // COUNTS) // longest)), longest)

    def rows_of(self, lengths: Sequence[int]) -> list[int]:
        """Returns the length of each row of the shape: the given rows, then padding rows, then empty ones."""
        whole, rest = divmod(self.tokens - sum(lengths), self.longest)
        return [*lengths, *[self.longest] * whole, rest, *[0] * self.rows][: self.rows]

    def other_rows(self, lengths: Sequence[int]) -> list[int]:
        """Returns row lengths of this shape that differ from `rows_of(lengths)` if any can."""
        each, more = divmod(self.tokens, self.rows)
        even = [each + (number < more) for number in range(self.rows)]
        return even if even != self.rows_of(lengths) else self.rows_of(())[::-1]


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


class Recorder(Protocol):
    """Records a computation so that one call repeats it on the current content of its tensors."""

    def warm(self, passes: Callable[[], ResultT]) -> ResultT:
        """Runs `passes` as they will be recorded, without recording."""
        ...

    def record(self, passes: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        """Returns a function that repeats `passes` into the same tensors, and their result."""
        ...


class CudaGraphs:
    """Records CUDA graphs. All share one memory pool, in which the next may reuse what one no longer needs, so no two may run at
    once; and one stream, whose cuBLAS workspaces exist once it is warm."""

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
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    result = passes()
            except BaseException:
                self._abandon(graph)
                raise
            finally:  # torch.cuda.graph leaves its stream the current one if the capture cannot be ended
                torch.cuda.set_stream(before)
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Frees what a failed capture keeps.

        If its end raised, the allocator still asks the graph which allocations belong to it, so this ends before the graph does
        (ATen/cuda/CUDAGraph.cpp, capture_end and reset).
        """
        number = torch.cuda.current_device()
        with suppress(RuntimeError):  # raises where the end of the capture has done so
            torch._C._cuda_endAllocateToPool(number, self.pool)
            torch._C._cuda_releasePool(number, self.pool)
        graph.reset()


@dataclass(frozen=True)
class RecordedGraphs:
    """The replay functions of one shape's two passes."""

    tokens: int
    forward: Callable[[], None]
    backward: Callable[[], None]
    scratch: tuple[Tensor, ...]  # shared buffers that the graphs write to; a reference keeps them from being reused


class GraphedModel:
    """A TextModel for train/text/loss whose decoder runs as CUDA graphs; they add to the gradients of `parameters`.

    `capacity` is a shape that fits every micro-batch. `record_first` records before training starts. A later shape that cannot
    be recorded ends the run if graphs are `required`; else no more is recorded, and the model computes all further shapes, as
    it does beyond MOST_SHAPES. It computes a shape whose recording differs from it too. The caller frees the loss of a
    micro-batch before the next one (train/task.gradients_by_batch): a live autograd graph would bring its stream into a
    recording.
    """

    def __init__(
        self,
        text: TextModel,
        parameters: Mapping[str, Parameter],
        recorder: Recorder,
        capacity: BatchShape,
        *,
        required: bool = True,
    ) -> None:
        self.text, self.capacity, self.required = text, capacity, required
        self.recorder: Recorder | None = recorder  # None after one has failed
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.graphs: dict[BatchShape, RecordedGraphs | None] = {}  # None: the model computes micro-batches of this shape
        self.ids, self.positions = (torch.zeros(capacity.tokens, dtype=torch.int64, device=text.device) for _ in range(2))
        self.starts = torch.zeros(capacity.rows + 1, dtype=torch.int32, device=text.device)
        self.sums: list[Tensor | None] = []  # the parameters' gradients; None where no graph depends on a parameter
        self.states = self.upstream = torch.empty(0)  # (tokens of the capacity, hidden), once the width is known
        self.pass_number = 0  # counts passes: tells whether the states of a forward pass are still in their buffer
        self.dummy = torch.zeros((), requires_grad=True)

    @property
    def head_weight(self) -> RowSource | None:
        return self.text.head_weight

    def head(self, hidden: Tensor) -> Tensor:
        """Returns the model's logits (n, vocabulary) of `hidden` (n, hidden)."""
        return self.text.head(hidden)

    def hidden(self, batch: Batch) -> Tensor:
        """Returns the decoder's last hidden states at the positions that predict a target, (targets, hidden), with gradient.

        They are valid until the next micro-batch, which must follow their backward pass.
        """
        shape = BatchShape.of(batch.lengths, self.capacity.longest)
        if shape not in self.graphs and len(self.graphs) < MOST_SHAPES and self.recorder is not None:
            self.graphs[shape] = self._verified(shape, batch)
        graphs = self.graphs.get(shape)
        return self.text.hidden(batch) if graphs is None else self._replayed(graphs, shape, batch)

    def record_first(self, batch: Batch) -> None:
        """Records the shape of `batch`, which should be the largest: later ones reuse its memory.

        Raises NotRecorded if it cannot be recorded or fails the check.
        """
        shape = BatchShape.of(batch.lengths, self.capacity.longest)
        self.graphs[shape], difference = self._recorded_and_compared(shape, batch)
        if difference:
            raise NotRecorded(difference)

    def prove_on(self, batch: Batch) -> None:
        """Compares the graphs of the shape of `batch` with the model on it, recorded now if they were not. Raises as
        `record_first`, and leaves gradients as they are."""
        shape = BatchShape.of(batch.lengths, self.capacity.longest)
        graphs = self.graphs.get(shape)
        if graphs is None:
            self.record_first(batch)
            return
        with recording_errors(self.required), _without_gradients(self.parameters):
            difference = self._difference(shape, graphs, batch)
        if difference:
            raise NotRecorded(difference)

    def _verified(self, shape: BatchShape, batch: Batch) -> RecordedGraphs | None:
        """Returns the graphs of a new shape; None, with a warning, if they fail the check, or if it cannot be recorded and
        graphs are not required: then no more is recorded."""
        of_which, ask = "of this shape are", " Please report it."
        try:
            graphs, difference = self._recorded_and_compared(shape, batch)
        except NotRecorded as error:
            if self.required:
                raise
            difference, self.recorder = error.reason, None
            of_which, ask = "of this and any other new shape are", ask if error.to_report else ""
        if not difference:
            return graphs
        if self.recorder is None:
            free_failed_recording()
        message = "%s: %s. Micro-batches %s computed without CUDA graphs.%s"
        logging.getLogger("lorakeet").warning(message, SETTING, difference, of_which, ask)
        return None

    def _recorded_and_compared(self, shape: BatchShape, batch: Batch) -> tuple[RecordedGraphs, str]:
        """Returns the graphs, and in words how they differ from the model. NotRecorded if they cannot be recorded."""
        with recording_errors(self.required), _without_gradients(self.parameters):
            if shape.tokens > self.capacity.tokens or shape.rows > self.capacity.rows:
                raise ValueError(f"the buffers are made for {self.capacity}, and {shape} is larger")
            graphs = self._record(shape, batch.lengths)
            return graphs, self._difference(shape, graphs, batch)

    def _record(self, shape: BatchShape, lengths: Sequence[int]) -> RecordedGraphs:
        """Records both passes on made-up rows that differ from the real ones, so that the check finds numbers baked in."""
        self._fill(shape.other_rows(lengths), self.ids.new_zeros(shape.tokens))
        self.positions.zero_()
        offsets = RowOffsets(self.starts[: shape.rows + 1], min(shape.longest, shape.tokens))
        self.text.train()
        assert self.recorder is not None
        LAST.clear()  # nothing of a pass before the recording, nor of its memory after it
        try:
            with torch.enable_grad(), fresh_copies():
                inputs = self.ids[: shape.tokens], self.positions[: shape.tokens], offsets
                return self._warmed_and_recorded(self.recorder, *inputs)
        finally:
            LAST.clear()

    def _warmed_and_recorded(self, recorder: Recorder, *inputs: Any) -> RecordedGraphs:
        """Records both passes over the buffers of tokens, positions and row offsets."""
        decoded, parameters, tokens = self.text.states_at, self.parameters, len(inputs[0])

        def both() -> tuple[Tensor, list[bool]]:
            out = decoded(*inputs)
            if not out.requires_grad:
                raise NotRecorded("nothing is trained below the output head", f"{TURN_OFF}.")
            found = torch.autograd.grad(out, parameters, torch.zeros_like(out), allow_unused=True)
            return out.detach(), [grad is not None for grad in found]

        for _ in range(WARM_UPS):
            out, used = recorder.warm(both)
        if not self.sums:
            self.states, self.upstream = (out.new_zeros(self.capacity.tokens, out.shape[1]) for _ in range(2))
            self.sums = [torch.zeros_like(each) if trains else None for each, trains in zip(parameters, used, strict=True)]
        states, upstream, sums = self.states[:tokens], self.upstream[:tokens], self.sums

        def forward() -> Tensor:
            out = decoded(*inputs)
            states.copy_(out.detach())
            return out

        replay_forward, out = recorder.record(forward)

        def backward() -> None:
            found = torch.autograd.grad(out, parameters, upstream, allow_unused=True)
            pairs = [(total, grad) for total, grad in zip(sums, found, strict=True) if total is not None and grad is not None]
            torch._foreach_add_([total for total, _ in pairs], [grad for _, grad in pairs])

        replay_backward, _ = recorder.record(backward)
        return RecordedGraphs(tokens, replay_forward, replay_backward, SCRATCH.lent())

    def _fill(self, rows: Sequence[int], ids: Tensor) -> None:
        """Writes tokens, positions and row offsets into the buffers; `rows` are the lengths of all rows."""
        positions = np.concatenate([np.arange(length) for length in rows])
        starts = np.cumsum([0, *rows], dtype=np.int32)
        self.ids[: len(ids)].copy_(ids)
        self.ids[len(ids) : len(positions)].zero_()
        for buffer, numbers in ((self.positions, positions), (self.starts, starts)):
            buffer[: len(numbers)].copy_(to_device(torch.from_numpy(numbers), buffer.device))

    def _replayed(self, graphs: RecordedGraphs, shape: BatchShape, batch: Batch) -> Tensor:
        self._fill(shape.rows_of(batch.lengths), batch.ids)
        states: Tensor = _Replay.apply(self.dummy, self, graphs)  # type: ignore[no-untyped-call]
        return states.index_select(0, batch.target_positions.to(states.device))

    def move_gradients(self) -> None:
        """Makes the buffers that the graphs add to the parameters' gradients, with the gradients so far, or zeros."""
        fresh, others = [], []
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            grad = parameter.grad
            if total is None or grad is total:
                continue
            if grad is None:
                fresh.append(total)
            else:
                others.append((total, grad))
            parameter.grad = total
        if fresh:
            torch._foreach_zero_(fresh)
        if others:
            torch._foreach_copy_([total for total, _ in others], [grad for _, grad in others])

    def _difference(self, shape: BatchShape, graphs: RecordedGraphs, batch: Batch) -> str:
        """Says how the graphs differ from the model by more than rounding; empty if they do not."""
        batch = batch.to(self.text.device)
        with torch.enable_grad(), _perturbed(self.parameters):
            hidden = self.text.hidden(batch)
            upstream = _noise(hidden, seed=shape.tokens)
            theirs = torch.autograd.grad(hidden, self.parameters, upstream, allow_unused=True)
            found = self._replayed(graphs, shape, batch)
            found.backward(upstream)  # type: ignore[no-untyped-call]
            mine = [parameter.grad for parameter in self.parameters]
            grads = {}
            for name, one, other in zip(self.names, mine, theirs, strict=True):
                if (one is None) != (other is None):
                    return f"of the model and its CUDA graphs only one has a gradient of {name}"
                if one is not None and other is not None:
                    grads[f"the gradient of {name}"] = one, other
            states = found.detach(), hidden.detach()
            return _too_far({"hidden states": states}) or _token_too_far(*states) or _too_far(grads)


class _Replay(torch.autograd.Function):
    """The graphs of a decoder as an autograd function. Inputs and results are fixed buffers; `dummy` requires a gradient, since
    autograd calls `backward` only if an input does."""

    @staticmethod
    def forward(ctx: Any, dummy: Tensor, model: GraphedModel, graphs: RecordedGraphs) -> Tensor:
        model.pass_number += 1
        ctx.model, ctx.graphs, ctx.pass_number = model, graphs, model.pass_number
        graphs.forward()
        return model.states[: graphs.tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        model: GraphedModel = ctx.model
        if ctx.pass_number != model.pass_number:
            raise RuntimeError("another micro-batch ran between the forward and backward pass of this one, in the same buffers")
        model.pass_number += 1
        model.upstream[: ctx.graphs.tokens].copy_(grad)
        model.move_gradients()
        ctx.graphs.backward()
        return None, None, None


@contextmanager
def _perturbed(parameters: Sequence[Parameter]) -> Iterator[None]:
    """A context in which noise is added to the adapter: just initialised, half of it would get no gradient."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.add_(_noise(parameter, seed=number), alpha=PERTURBATION)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def _without_gradients(parameters: Sequence[Parameter]) -> Iterator[None]:
    """A context without gradients; afterwards the parameters have their gradients again."""
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


def _noise(like: Tensor, *, seed: int) -> Tensor:
    """Returns normal numbers with the shape, dtype and device of `like`, the same on every machine."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def free_failed_recording() -> None:
    """Returns the memory of passes that could not be recorded to the device; the caller has dropped the recorder."""
    gc.collect()  # an error and the frames that it came through hold each other, and their tensors
    release_device_memory()


@contextmanager
def recording_errors(required: bool = True) -> Iterator[None]:
    """A context that turns torch's errors on recording, or on too little memory, into NotRecorded with a remedy; any other error
    too, with its type, where graphs are not `required`."""
    caught: type[Exception] = RuntimeError if required else Exception
    try:
        yield
    except NotRecorded:
        raise
    except caught as error:
        causes: list[BaseException] = [error]  # when a recording fails, ending it fails too, with a vaguer message
        while (link := causes[-1].__context__) is not None:
            causes.append(link)
        for cause in causes:
            if not isinstance(cause, Exception):  # Ctrl-C, whose recording could not be ended in order either
                raise cause from None
        if any(map(is_out_of_memory, causes)):
            raise NotRecorded(
                "the GPU is out of memory: to check CUDA graphs, their pass and the model's own are in memory at once",
                f"Lower train.micro_tokens. Or: {TURN_OFF}.",
            ) from error
        first = [cause for cause in causes if isinstance(cause, RuntimeError)][-1] if isinstance(error, RuntimeError) else error
        kind = "" if isinstance(first, RuntimeError) else f"{type(first).__name__}: "
        reason = kind + " ".join(str(first).split())[:ERROR_LENGTH].rstrip(".")
        raise NotRecorded(f"CUDA graphs cannot be recorded: {reason}") from error


def _too_far(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Names a pair of tensors that differ by more than rounding; empty if there is none."""
    norms = torch.stack([torch.stack([(a.float() - b.float()).norm(), b.float().norm()]) for a, b in pairs.values()])
    return _first_too_far(list(pairs), norms, TOLERANCE)


def _token_too_far(mine: Tensor, theirs: Tensor) -> str:
    """The same for hidden states (targets, hidden), token by token."""
    norms = torch.stack([(mine.float() - theirs.float()).norm(dim=1), theirs.float().norm(dim=1)], 1)
    return _first_too_far([f"hidden states of target {number}" for number in range(len(mine))], norms, TOKEN_TOLERANCE)


def _first_too_far(names: Sequence[str], norms: Tensor, tolerance: float) -> str:
    """`norms` (n, 2): of each difference, and of the model's own tensor."""
    least = NEGLIGIBLE * norms[:, 1].max().item()
    for name, (difference, norm) in zip(names, norms.tolist(), strict=True):
        allowed = tolerance * max(norm, least)
        if not difference <= allowed:
            return f"{name} of the CUDA graphs and of the model differ by {difference:.3g}, where rounding explains {allowed:.3g}"
    return ""

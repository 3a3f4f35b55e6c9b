"""A text model whose frozen weights come in from a store block by block; adapters, norms and moments stay.

    ids ──► rows of the embedding, read one by one ──► block 0 ──► … ──► block n−1 ──► norm ──► head, read tile by tile
                                                        each brought in, computed with, and out again

While a block is out, its frozen tensors are on the meta device: they have shapes, but no numbers. Without gradients the model
runs as ever. With gradients its blocks are run one at a time by whoever drives `StreamedBlocks` (train/text/streamed_gradients).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.layers.linear import BlockStandIn, StandIn
from lorakeet.core.plan import Plan
from lorakeet.core.tiled_product import tiled_product
from lorakeet.errors import ConfigError, DataError
from lorakeet.memory.store import StoredRows
from lorakeet.memory.stream import RecordStream
from lorakeet.models import modules


class NotStreamed(ConfigError):
    """A model whose blocks cannot be streamed, with the `reason` as a sentence; the message is for a run under a budget."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} Leave memory.budget out.")
        self.reason = reason


@dataclass
class BlockInputs:
    """What the decoder hands to its blocks for one batch: the states before the first, and each block's other arguments."""

    entry: Tensor | None = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class _TensorSlot:
    """Where a stored tensor belongs in a block."""

    module: nn.Module
    leaf: str
    name: str  # in the record
    empty: Tensor  # what stands there while the block is out


class StreamedBlocks:
    """The blocks of one model and the stream that brings them in; `stream_model` makes it."""

    def __init__(self, stream: RecordStream) -> None:
        self.stream = stream
        self.blocks: list[StreamedBlock] = []
        self._seats: list[list[_TensorSlot]] = []
        self._record: BlockInputs | None = None
        self._replay: Tensor | None = None

    def add(self, block: nn.Module) -> StreamedBlock:
        """Takes over the next block, whose frozen tensors are on the meta device, and returns what stands for it."""
        index = len(self.blocks)
        stored = self.stream.records[index].tensors
        self._seats.append([_seat(block, name) for name in stored])
        self.blocks.append(StreamedBlock(block, index, self))
        return self.blocks[-1]

    @property
    def running(self) -> bool:
        """Whether blocks compute when they are called; not while a passage is recorded or replayed."""
        return self._record is None and self._replay is None

    @contextmanager
    def present(self, index: int, then: int | None = None) -> Iterator[nn.Module]:
        """Block `index` with its weights, for the length of the context; `then` (default: the next) is read meanwhile."""
        after = (index + 1) % len(self.blocks) if then is None else then
        views = self.stream.fetch(index, after)
        try:
            for seat in self._seats[index]:
                _sit(seat, views[seat.name])
            yield self.blocks[index].original
        finally:
            for seat in self._seats[index]:
                _sit(seat, seat.empty)

    @contextmanager
    def recording(self) -> Iterator[BlockInputs]:
        """The decoder run in this context computes no block: it only tells what it would hand to them."""
        self._record = BlockInputs()
        try:
            yield self._record
        finally:
            self._record = None

    @contextmanager
    def replaying(self, states: Tensor) -> Iterator[None]:
        """The decoder run in this context computes no block: `states` are taken for what the last one gives."""
        self._replay = states
        try:
            yield
        finally:
            self._replay = None

    def pass_through(self, index: int, states: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """What a block gives while none computes."""
        if self._record is not None:
            if index == 0:
                self._record.entry = states
            self._record.arguments.append(arguments)
            return states
        last = index == len(self.blocks) - 1
        return cast(Tensor, self._replay) if last else states


class StreamedBlock(BlockStandIn):
    """Stands for a decoder block whose weights come and go."""

    def __init__(self, original: nn.Module, index: int, streamed: StreamedBlocks) -> None:
        super().__init__(original)
        self.index = index
        self._streamed = streamed

    def weights_loaded(self) -> AbstractContextManager[nn.Module]:
        """The block with its weights."""
        return self._streamed.present(self.index)

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._streamed.running:
            return self._streamed.pass_through(self.index, states, (args, kwargs))
        if torch.is_grad_enabled():
            raise RuntimeError("only train/text/streamed_gradients differentiates a streamed block: its weights leave too early")
        with self._streamed.present(self.index) as block:
            return plain_output(block(states, *args, **kwargs))


class StreamedEmbedding(StandIn):
    """Stands for an nn.Embedding of which only the rows that are asked for are read."""

    def __init__(self, original: nn.Embedding, rows: StoredRows) -> None:
        super().__init__(original)
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The frozen weight, without numbers."""
        return cast(Tensor, self.original.weight)

    def weights_loaded(self) -> AbstractContextManager[nn.Module]:
        """The embedding with its whole weight in memory."""
        return _whole(self.original, self.rows)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.rows.lookup(ids)
        scale = getattr(self.original, "embed_scale", None)  # Gemma's
        return found if scale is None else found * scale.to(found.dtype)


class StreamedHead(StandIn):
    """Stands for a head without bias, whose weight is read tile by tile."""

    def __init__(self, original: nn.Linear, rows: StoredRows) -> None:
        super().__init__(original)
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The frozen weight, without numbers."""
        return cast(Tensor, self.original.weight)

    def weights_loaded(self) -> AbstractContextManager[nn.Module]:
        """The head with its whole weight in memory."""
        return _whole(self.original, self.rows)

    def forward(self, hidden: Tensor) -> Tensor:
        return tiled_product(hidden.reshape(-1, hidden.shape[-1]), self.rows).view(*hidden.shape[:-1], -1)


def plain_output(output: Any) -> Tensor:
    """The states that a block gives; NotStreamed for blocks that give more than one thing."""
    if isinstance(output, Tensor):
        return output
    raise NotStreamed(
        f"A block of this model gives a {type(output).__name__} where its hidden states were expected, so that it cannot be "
        "streamed."
    )


def make_resident(model: nn.Module, plan: Plan) -> None:
    """Makes the embedding and the head resident where `plan` puts something on them; the rest goes on streaming."""
    paths = [entry.path for entry in plan.entries]
    paths += [path for extra in plan.extras for path in (extra.path, extra.tied) if path]
    found = [modules.find(model, path) for path in dict.fromkeys(paths)]
    asked = {stand_in.weight for stand_in in found if isinstance(stand_in, (StreamedEmbedding, StreamedHead))}
    shared: dict[Tensor, nn.Parameter] = {}  # by the empty weight, so that tied ones stay one
    for path, module in list(modules.original_modules(model)):
        stand_in = modules.find(model, path)
        if not isinstance(stand_in, (StreamedEmbedding, StreamedHead)):
            continue
        empty = stand_in.weight
        if empty in asked:
            if empty not in shared:
                shared[empty] = nn.Parameter(stand_in.rows[0 : stand_in.rows.shape[0]], requires_grad=False)
            cast(Any, module).weight = shared[empty]
            modules.replace(model, path, module)


@contextmanager
def _whole(module: nn.Module, rows: StoredRows) -> Iterator[nn.Module]:
    seat = _TensorSlot(module, "weight", "weight", cast(Tensor, module.weight))
    try:
        _sit(seat, rows[:])
        yield module
    finally:
        _sit(seat, seat.empty)


def _seat(block: nn.Module, name: str) -> _TensorSlot:
    path, _, leaf = name.rpartition(".")
    module = cast(nn.Module, modules.find(block, path))
    module = modules.unwrapped(module)
    held = module._parameters.get(leaf)
    empty = cast(Tensor, held if held is not None else module._buffers[leaf])
    return _TensorSlot(module, leaf, name, empty)


def _sit(seat: _TensorSlot, tensor: Tensor) -> None:
    if seat.leaf in seat.module._parameters:
        is_parameter = isinstance(tensor, nn.Parameter)
        seat.module._parameters[seat.leaf] = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)  # type: ignore[assignment]
    else:
        if (tensor.shape, tensor.dtype) != (seat.empty.shape, seat.empty.dtype):
            found, wanted = ((tuple(each.shape), each.dtype) for each in (tensor, seat.empty))
            raise DataError(f"{seat.name} of the store is {found}, where the model has {wanted}. Make the store again.")
        seat.module._buffers[seat.leaf] = tensor

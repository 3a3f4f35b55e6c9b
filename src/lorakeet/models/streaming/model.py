"""A text model whose frozen weights are streamed from a store block by block; adapters and optimizer state stay in memory.

    ids ──► rows of the embedding, read one by one ──► block 0 ──► … ──► block n−1 ──► norm ──► head, read tile by tile
                                                        each loaded, computed and freed

While a block is not loaded, its frozen tensors are on the meta device: they have shapes, but no numbers. Without gradients the
model runs as usual. With gradients the caller runs its blocks one at a time (train/text/streamed_gradients).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.layers.linear import BlockReplacement, Replacement
from lorakeet.core.plan import Plan
from lorakeet.core.tiled_product import tiled_product
from lorakeet.errors import ConfigError, DataError
from lorakeet.memory.store import StoredRows
from lorakeet.memory.stream import RecordStream
from lorakeet.models import modules


class NotStreamed(ConfigError):
    """The model's blocks cannot be streamed; `reason` is a sentence, the message is for a run with a budget."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} Leave the memory budget (memory.budget, --memory) out.")
        self.reason = reason


@dataclass
class BlockInputs:
    """The inputs of all blocks for one batch: the states before the first, and each block's other arguments."""

    entry: Tensor | None = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class _TensorSlot:
    """The attribute of a module that takes a stored tensor."""

    module: nn.Module
    leaf: str
    name: str  # in the record
    empty: Tensor  # the meta tensor while the block is not loaded


class StreamedBlocks:
    """The blocks of one model and the stream that loads them; `streaming.load` makes it."""

    def __init__(self, stream: RecordStream) -> None:
        self.stream = stream
        self.blocks: list[StreamedBlock] = []
        self._slots: list[list[_TensorSlot]] = []
        self._record: BlockInputs | None = None
        self._replay: Tensor | None = None
        self._ids: Tensor | None = None

    def add(self, block: nn.Module) -> StreamedBlock:
        """Adds the next block, whose frozen tensors are on the meta device, and returns its wrapper."""
        index = len(self.blocks)
        stored = self.stream.records[index].tensors
        self._slots.append([_slot_of(block, name) for name in stored])
        self.blocks.append(StreamedBlock(block, index, self))
        return self.blocks[-1]

    @property
    def running(self) -> bool:
        """True if blocks compute when they are called: not while inputs are recorded or replayed."""
        return self._record is None and self._replay is None

    @contextmanager
    def present(self, index: int, then: int | None = None) -> Iterator[nn.Module]:
        """A context with block `index` loaded; `then` (default: the next block) is read meanwhile."""
        after = (index + 1) % len(self.blocks) if then is None else then
        views = self.stream.fetch(index, after)
        try:
            for slot in self._slots[index]:
                _set(slot, views[slot.name])
            yield self.blocks[index].original
        finally:
            for slot in self._slots[index]:
                _set(slot, slot.empty)

    @contextmanager
    def recording(self) -> Iterator[BlockInputs]:
        """A context in which the decoder computes no block, but records their inputs."""
        self._record = BlockInputs()
        try:
            yield self._record
        finally:
            self._record = None

    @contextmanager
    def replaying(self, states: Tensor) -> Iterator[None]:
        """A context in which the decoder computes no block, and the last one returns `states`."""
        self._replay = states
        try:
            yield
        finally:
            self._replay = None

    @contextmanager
    def looking_up(self, ids: Tensor) -> Iterator[None]:
        """A context in which the decoder is given these ids (1, tokens), which are on the host."""
        self._ids = ids
        try:
            yield
        finally:
            self._ids = None

    def embedded(self, ids: Tensor, rows: StoredRows) -> Tensor:
        """The rows of `ids` (…) as (…, columns); zeros while nothing reads them, since the last block's states are replayed."""
        if self._replay is not None:
            return torch.zeros((), dtype=rows.dtype, device=ids.device).expand(*ids.shape, rows.shape[1])
        return rows.lookup(ids if self._ids is None or self._ids.shape != ids.shape else self._ids)

    def pass_through(self, index: int, states: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """Returns the output of a block while none computes."""
        if self._record is not None:
            if index == 0:
                self._record.entry = states
            self._record.arguments.append(arguments)
            return states
        last = index == len(self.blocks) - 1
        return cast(Tensor, self._replay) if last else states


class StreamedBlock(BlockReplacement):
    """Wraps a decoder block whose weights are streamed."""

    def __init__(self, original: nn.Module, index: int, streamed: StreamedBlocks) -> None:
        super().__init__(original)
        self.index = index
        self._streamed = streamed

    def weights_loaded(self) -> AbstractContextManager[nn.Module]:
        """A context with the block's weights loaded."""
        return self._streamed.present(self.index)

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._streamed.running:
            return self._streamed.pass_through(self.index, states, (args, kwargs))
        if torch.is_grad_enabled():
            raise RuntimeError("only train/text/streamed_gradients differentiates streamed blocks: their weights are freed early")
        with self._streamed.present(self.index) as block:
            return plain_output(block(states, *args, **kwargs))


class _StreamedMatrix(Replacement):
    """Wraps a module whose weight is read from the store some rows at a time."""

    def __init__(self, original: nn.Module, rows: StoredRows) -> None:
        super().__init__(original)
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The frozen weight, on the meta device."""
        return cast(Tensor, self.original.weight)

    def weights_loaded(self) -> AbstractContextManager[nn.Module]:
        """A context with the whole weight in memory."""
        return _whole(self.original, self.rows)


class StreamedEmbedding(_StreamedMatrix):
    """Wraps an nn.Embedding whose rows are read one by one."""

    def __init__(self, original: nn.Module, rows: StoredRows, streamed: StreamedBlocks) -> None:
        super().__init__(original, rows)
        self._streamed = streamed

    def forward(self, ids: Tensor) -> Tensor:
        found = self._streamed.embedded(ids, self.rows)
        scale = getattr(self.original, "embed_scale", None)  # Gemma's
        return found if scale is None else found * scale.to(found.dtype)


class StreamedHead(_StreamedMatrix):
    """Wraps a head without bias, whose weight is read tile by tile."""

    def forward(self, hidden: Tensor) -> Tensor:
        return tiled_product(hidden.reshape(-1, hidden.shape[-1]), self.rows).view(*hidden.shape[:-1], -1)


def plain_output(output: Any) -> Tensor:
    """Returns the states that a block returned; NotStreamed if it returned anything else."""
    if isinstance(output, Tensor):
        return output
    raise NotStreamed(
        f"A block of this model returns a {type(output).__name__}; expected its hidden states alone. So it cannot be streamed."
    )


def make_resident(model: nn.Module, plan: Plan) -> None:
    """Loads the embedding and the head into memory if `plan` adapts them; other weights stay streamed."""
    paths = [entry.path for entry in plan.entries]
    paths += [path for extra in plan.extras for path in (extra.path, extra.tied) if path]
    found = [modules.find(model, path) for path in dict.fromkeys(paths)]
    adapted = {stand_in.weight for stand_in in found if isinstance(stand_in, (StreamedEmbedding, StreamedHead))}
    shared: dict[Tensor, nn.Parameter] = {}  # by the empty weight, so that tied ones stay tied
    for path, module in list(modules.original_modules(model)):
        stand_in = modules.find(model, path)
        if not isinstance(stand_in, (StreamedEmbedding, StreamedHead)):
            continue
        empty = stand_in.weight
        if empty in adapted:
            if empty not in shared:
                shared[empty] = nn.Parameter(stand_in.rows[0 : stand_in.rows.shape[0]], requires_grad=False)
            cast(Any, module).weight = shared[empty]
            modules.replace(model, path, module)


@contextmanager
def _whole(module: nn.Module, rows: StoredRows) -> Iterator[nn.Module]:
    slot = _TensorSlot(module, "weight", "weight", cast(Tensor, module.weight))
    try:
        _set(slot, rows[:])
        yield module
    finally:
        _set(slot, slot.empty)


def _slot_of(block: nn.Module, name: str) -> _TensorSlot:
    path, _, leaf = name.rpartition(".")
    module = cast(nn.Module, modules.find(block, path))
    module = modules.unwrapped(module)
    parameter = module._parameters.get(leaf)
    empty = cast(Tensor, parameter if parameter is not None else module._buffers[leaf])
    return _TensorSlot(module, leaf, name, empty)


def _set(slot: _TensorSlot, tensor: Tensor) -> None:
    if slot.leaf in slot.module._parameters:
        is_parameter = isinstance(tensor, nn.Parameter)
        slot.module._parameters[slot.leaf] = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)  # type: ignore[assignment]
    else:
        if (tensor.shape, tensor.dtype) != (slot.empty.shape, slot.empty.dtype):
            found, wanted = ((tuple(each.shape), each.dtype) for each in (tensor, slot.empty))
            raise DataError(f"{slot.name} of the store is {found}, where the model has {wanted}. Make the store again.")
        slot.module._buffers[slot.leaf] = tensor

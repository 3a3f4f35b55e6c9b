"""Records the inputs of a text model's blocks on calibration rows, batch by batch, without running a block.

    rows ─► embedding ─► states (of block 0) ─► [a block computes them] ─► states (of block 1) ─► …
            and the other arguments of each block, such as the angles of rotary positions

The caller chooses where they are kept: in memory, or in scratch files (memory/spill), with one batch in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lorakeet.data.pack import Batch
from lorakeet.memory.spill import Spill
from lorakeet.models.text.model import TextModel


@dataclass(frozen=True)
class _ArgumentStub:
    """Replaces a spilled tensor among the arguments of a call."""

    batch: int
    number: int


class CalibrationStates:
    """The hidden states of all batches before one block after another. `new` makes a Spill; three are made."""

    def __init__(self, text: TextModel, blocks: nn.ModuleList, batches: Sequence[Batch], new: Callable[[], Spill]) -> None:
        self.count = len(batches)
        self._states, self._next, self._shared = new(), new(), new()
        self._calls: list[list[Any]] = []  # by batch, the arguments of each block, with stubs for tensors
        self._record(text, blocks, batches)

    def states(self, batch: int) -> Tensor:
        """Returns the input of the current block, which must not be written to."""
        return self._states.get(batch)

    def run(self, block: nn.Module, number: int, batch: int) -> Tensor:
        """Returns the output of `block`, the one of that number, for a batch."""
        args, kwargs = tree_map_only(_ArgumentStub, self._shared.get, self._calls[batch][number])
        found = block(self.states(batch), *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    def advance(self, block: nn.Module, number: int) -> None:
        """Runs every batch through `block`: its outputs are the inputs of the next one."""
        for batch in range(self.count):
            self._next.put(batch, self.run(block, number, batch))
            self._states.take(batch)
        self._states, self._next = self._next, self._states

    def close(self) -> None:
        """Drops everything and closes the scratch files."""
        for spill in (self._states, self._next, self._shared):
            spill.close()

    def _record(self, text: TextModel, blocks: nn.ModuleList, batches: Sequence[Batch]) -> None:
        originals = list(blocks)
        recorders = [_Recorder(block) for block in originals]
        try:
            for number, recorder in enumerate(recorders):
                blocks[number] = recorder
            watched = text.with_every_token()
            with torch.no_grad():
                for number, batch in enumerate(batches):
                    watched.hidden(batch)
                    self._keep(number, recorders)
        finally:
            for number, block in enumerate(originals):
                blocks[number] = block

    def _keep(self, batch: int, recorders: Sequence[_Recorder]) -> None:
        """Spills the arguments of the blocks' calls; a tensor that several blocks get is stored once."""
        stubs: dict[int, _ArgumentStub] = {}

        def spill(tensor: Tensor) -> _ArgumentStub:
            if id(tensor) not in stubs:
                stubs[id(tensor)] = _ArgumentStub(batch, len(stubs))
                self._shared.put(stubs[id(tensor)], tensor)
            return stubs[id(tensor)]

        calls = [recorder.call for recorder in recorders]  # kept alive until all are stored, so that ids stay unique
        self._states.put(batch, recorders[0].states)
        self._calls.append([tree_map_only(Tensor, spill, call) for call in calls])
        for recorder in recorders:
            recorder.forget()


class _Recorder(nn.Module):
    """Replaces a block: records its arguments and returns its input unchanged."""

    states: Tensor
    call: Any

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)  # models read settings such as attention_type from their blocks

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["states"], self.__dict__["call"] = hidden_states, (args, kwargs)
        return hidden_states

    def forget(self) -> None:
        """Drops the recorded arguments."""
        del self.__dict__["states"], self.__dict__["call"]

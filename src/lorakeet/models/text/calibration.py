"""What goes into the blocks of a text model on calibration rows, batch by batch, without any block being run.

    rows ─► embedding ─► states (of block 0) ─► [a block computes them] ─► states (of block 1) ─► …
            beside them what else each block is called with, such as the angles of rotary positions

Both are kept where the caller says: in memory, or in scratch files (memory/spill), so that no more than a batch is in memory.
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
    """Stands for a tensor among the arguments of a call."""

    batch: int
    number: int


class CalibrationStates:
    """The batches on their way through the blocks. `new` makes a place for tensors; three are made, two of which take turns."""

    def __init__(self, text: TextModel, blocks: nn.ModuleList, batches: Sequence[Batch], new: Callable[[], Spill]) -> None:
        self.count = len(batches)
        self._states, self._next, self._shared = new(), new(), new()
        self._calls: list[list[Any]] = []  # of each batch, the call of each block, its tensors put aside
        self._record(text, blocks, batches)

    def states(self, batch: int) -> Tensor:
        """What goes into the present block, which must not be written to."""
        return self._states.get(batch)

    def run(self, block: nn.Module, number: int, batch: int) -> Tensor:
        """What `block`, the one of that number, gives for a batch."""
        args, kwargs = tree_map_only(_ArgumentStub, self._shared.get, self._calls[batch][number])
        found = block(self.states(batch), *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    def advance(self, block: nn.Module, number: int) -> None:
        """Lets every batch through `block`: what it gives is what goes into the next one."""
        for batch in range(self.count):
            self._next.put(batch, self.run(block, number, batch))
            self._states.take(batch)
        self._states, self._next = self._next, self._states

    def close(self) -> None:
        """Forgets everything, and ends the scratch files."""
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
        """Puts aside what the blocks were called with; a tensor that several of them get is kept once."""
        places: dict[int, _ArgumentStub] = {}

        def spill(tensor: Tensor) -> _ArgumentStub:
            if id(tensor) not in places:
                places[id(tensor)] = _ArgumentStub(batch, len(places))
                self._shared.put(places[id(tensor)], tensor)
            return places[id(tensor)]

        calls = [recorder.call for recorder in recorders]  # held until all are kept: no two tensors have one id
        self._states.put(batch, recorders[0].states)
        self._calls.append([tree_map_only(Tensor, spill, call) for call in calls])
        for recorder in recorders:
            recorder.forget()


class _Recorder(nn.Module):
    """Stands in for a block, keeps what it is called with, and hands its input on as it is."""

    states: Tensor
    call: Any

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)  # models read settings such as attention_type off their blocks

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["states"], self.__dict__["call"] = hidden_states, (args, kwargs)
        return hidden_states

    def forget(self) -> None:
        """Lets go of what it was called with."""
        del self.__dict__["states"], self.__dict__["call"]

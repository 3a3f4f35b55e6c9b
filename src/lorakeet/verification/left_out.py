"""Passes of the live model without some of its pairs, each from the first block that computes otherwise on.

    first pass      the output of every block is kept, for a batch of rows
    later passes    blocks below the lowest one with a pair that is left out return what is kept
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lorakeet.core.layers.linear import BlockReplacement
from lorakeet.core.lowrank import LoraPair
from lorakeet.evaluate.intervals import Floats
from lorakeet.models import modules
from lorakeet.models.modules import adapted_layers
from lorakeet.verification.artefact import InTorch

Outputs = list[Any]  # of each block, for one batch
_MOST = 1 << 30  # bytes of outputs of all batches
_EQUAL = 1e-4  # nats: a pass that begins in the middle ends as a whole one does


class KeptBlock(BlockReplacement):
    """A decoder block whose output may be kept, and returned in a later pass."""

    def __init__(self, original: nn.Module, number: int, kept: KeptOutputs) -> None:
        super().__init__(original)
        self.number, self.kept = number, kept

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = self.kept
        if kept.returned is not None and self.number < kept.begin:
            return kept.returned[self.number]
        found = self.original(states, *args, **kwargs)
        if kept.recorded is not None:
            kept.recorded.append(found)
        return found


class KeptOutputs:
    """The blocks of a live model, and what they returned; `able` is False where passes cannot begin between them."""

    def __init__(self, live: InTorch) -> None:
        self.live, self.model = live, live.text.model
        self.path, self.count = modules.block_prefix(self.model, live.text.family)
        shared = int(getattr(self.model.config.get_text_config(), "num_kv_shared_layers", None) or 0)  # of earlier blocks
        fits = not live.bounded and live.text.streamed is None
        self.able = fits and not shared and modules.blocks_run_once(self.model, live.text.family)
        self.begin, self.returned, self.recorded = 0, cast("Outputs | None", None), cast("Outputs | None", None)
        self.bytes, self.tried = 0, False

    @contextmanager
    def in_place(self) -> Iterator[KeptOutputs]:
        """A context in which the model's blocks keep what they return."""
        paths = [f"{self.path}.{number}" for number in range(self.count)] if self.able else []
        for number, path in enumerate(paths):
            modules.replace(self.model, path, KeptBlock(cast(nn.Module, modules.find(self.model, path)), number, self))
        try:
            yield self
        finally:
            for path in paths:
                modules.replace(self.model, path, cast(KeptBlock, modules.find(self.model, path)).original)

    @contextmanager
    def recording(self) -> Iterator[Outputs]:
        """A context whose one pass puts the output of each block into the list; nothing where that would be too much."""
        found: Outputs = []
        self.recorded = found if self.able and self.bytes < _MOST else None
        try:
            yield found
        finally:
            self.recorded = None
        if len(found) != self.count or not all(isinstance(one, Tensor) for one in found):
            found.clear()
        self.bytes += sum(one.nbytes for one in found)

    @contextmanager
    def beginning(self, outputs: Outputs, left: frozenset[str]) -> Iterator[None]:
        """A context in which passes over the batch of `outputs` begin at the lowest block with a module of `left`."""
        self.begin = min((self._block_of(path) for path in left), default=0)
        self.returned = outputs or None
        try:
            yield
        finally:
            self.returned = None

    def require_same(self, outputs: Outputs, whole: Floats, again: Callable[[], Floats]) -> None:
        """Drops `outputs`, and keeps no more, if a pass that begins in the middle ends otherwise than the `whole` one.

        Some models pass more between blocks than their states.
        """
        if outputs and not self.tried:
            with self.beginning(outputs, frozenset([f"{self.path}.{self.count // 2}."])):
                self.able = bool(np.allclose(again(), whole, atol=_EQUAL, rtol=0))
            self.tried = True
        if not self.able:
            outputs.clear()

    def _block_of(self, path: str) -> int:
        """The number of a module's block; 0 for what lies outside of blocks, and may come before them."""
        number = path.removeprefix(f"{self.path}.").partition(".")[0]
        return int(number) if path.startswith(f"{self.path}.") and number.isdigit() else 0


@contextmanager
def left_out(live: InTorch, left: frozenset[str]) -> Iterator[None]:
    """A context in which the live adapter has no pair on these modules; as it was afterwards."""
    name = live.adapter or ""
    layers = [layer for path, layer in adapted_layers(live.text.model) if path in left and name in layer.adapters]
    zeroed: list[tuple[Tensor, Tensor]] = []
    taken: list[tuple[Any, nn.Module]] = []
    with torch.no_grad():
        try:
            for layer in layers:
                pair = layer.adapters[name]
                if isinstance(pair, LoraPair) and pair.plain and pair.anchor_A is None:
                    zeroed.append((pair.B, pair.B.detach().clone()))
                    pair.B.zero_()
                else:
                    taken.append((layer, pair))
                    layer.detach(name)
            yield
        finally:
            for parameter, before in zeroed:
                parameter.copy_(before)
            for layer, pair in taken:
                layer.attach(name, pair)

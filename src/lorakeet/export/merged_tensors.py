"""The tensors of a model folder with an adapter merged in, computed one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter
from lorakeet.core.tiled_product import RowSource, as_matrix
from lorakeet.merge.checkpoint import Checkpoint, open_checkpoint
from lorakeet.merge.edits import Edits, edits_for


class MergedTensors:
    """The tensors of a base with an adapter merged in, by their names on disk. One tensor at a time is computed, in fp32."""

    def __init__(self, source: Path, adapter: Adapter | None) -> None:
        """ConfigError lists every tensor of the adapter that does not fit the model in `source`."""
        self.checkpoint: Checkpoint = open_checkpoint(source)
        self.edits = Edits({}, {}, ()) if adapter is None else edits_for(self.checkpoint, adapter)

    @property
    def names(self) -> list[str]:
        """Every tensor, those that the adapter adds last."""
        return list(dict.fromkeys([*self.checkpoint.home, *self.edits.by_name]))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor with the adapter merged in."""
        edit = self.edits.by_name.get(name)
        return edit.shape if edit else self.checkpoint.stored(name).shape

    def changes(self, name: str) -> bool:
        """True if the adapter changes numbers of the tensor."""
        edit = self.edits.by_name.get(name)
        return edit is not None and bool(edit.steps)

    @torch.no_grad()
    def fetch(self, name: str, *, folded: bool = True) -> Tensor:
        """The tensor in fp32; without `folded`, that of the base."""
        edit = self.edits.by_name.get(name)
        source = edit.source if edit else name
        tensor = self.checkpoint.read(source).float()
        for step in edit.steps if edit and folded else ():
            tensor = step(tensor)
        return tensor

    def rows(self, name: str) -> RowSource:
        """The tensor with the adapter merged in, fp32: readable in parts if the adapter does not change it, else whole."""
        if self.changes(name):
            return self.fetch(name)
        edit = self.edits.by_name.get(name)
        source = edit.source if edit else name
        return Fp32Rows(self.checkpoint.shards[self.checkpoint.home[source]].rows(source))


@dataclass(frozen=True)
class Fp32Rows:
    """Rows in another dtype, read as fp32."""

    stored: RowSource

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def as_matrix(self) -> Fp32Rows:
        """The tensor as a matrix, all dimensions but the last flattened to rows (core/tiled_product.StackedRows)."""
        return Fp32Rows(as_matrix(self.stored))

    def __getitem__(self, part: slice) -> Tensor:
        return self.stored[part].float()

"""Writes the packed form of a streamed text model to a store of its own, block by block, and streams it from there.

    store of the model    block 0 │ block 1 │ … │ embedding │ head │ …
                          layers folded and rounded, with one block in memory
    packed store          block 0 │ block 1 │ … │ embedding │ head │ …       the same but for those layers
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lorakeet.memory.store import WeightStore, new_store
from lorakeet.models import modules
from lorakeet.models.streaming.load import Residence, open_streamed
from lorakeet.models.streaming.model import StreamedBlocks
from lorakeet.models.text.load import read_config, set_attention
from lorakeet.models.text.model import TextModel
from lorakeet.quant.construct import empty_base
from lorakeet.quant.packed import PackedBase

_PACKED = "packed"  # key of a store's identity: the settings of its packed layers, by path


class StoredBases(Mapping[str, PackedBase]):
    """The packed weights of a store by the path of their layer, each read on access."""

    def __init__(self, store: WeightStore, paths: Iterable[str]) -> None:
        self._store, self._settings = store, json.loads(store.identity[_PACKED])
        self._paths = dict.fromkeys(paths)

    def __getitem__(self, path: str) -> PackedBase:
        if path not in self._paths:
            raise KeyError(path)
        base = empty_base(self._settings[path])
        base.load_state_dict({leaf: self._store.tensor(f"{path}.base.{leaf}") for leaf in base.state_dict()})
        return base

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def write_packed(text: TextModel, blocks: Iterable[Mapping[str, PackedBase]], path: Path) -> list[str]:
    """Writes the store of the streamed `text` to `path`, with the packed layers of `blocks` (by path, block by block, in order).

    Returns the paths of these layers. Only the packed layers of one block are in memory at a time, or one tensor outside the
    blocks. Raises StoreRefused if the store cannot be written.
    """
    source = cast(WeightStore, text.store)
    prefix, _ = modules.block_prefix(text.model, text.family)
    settings: dict[str, Any] = json.loads(source.identity[_PACKED])
    identity: dict[str, str] = {}
    paths: list[str] = []
    with new_store(path, identity=identity, tensors=8 * len(source.tensors)) as writer:
        for name in source.tensors:
            if not name.startswith(f"{prefix}."):
                owner, _, leaf = name.rpartition(".")
                writer.add(owner, {leaf: source.tensor(name)})
        for number, layers in enumerate(blocks):
            block = f"{prefix}.{number}"
            writer.add(block, _record(source, block, layers))
            settings.update({layer: base.settings for layer, base in layers.items()})
            paths += layers
        identity[_PACKED] = json.dumps(settings)
    return paths


def open_packed(text: TextModel, path: Path) -> TextModel:
    """Opens the store at `path` that `write_packed` made of the streamed `text`: no adapter, the same attention."""
    before = cast(StreamedBlocks, text.streamed).stream
    model, streamed = open_streamed(
        WeightStore.open(path, {}), read_config(text.source), text.dtype, text.family, residence=Residence(before.slots)
    )
    set_attention(model, text.attention)
    return dataclasses.replace(text, model=model, streamed=streamed)


def _record(source: WeightStore, block: str, layers: Mapping[str, PackedBase]) -> dict[str, Tensor]:
    """Returns the tensors of a block by their names in it: packed ones of `layers`, the others from `source`."""
    found = {
        f"{path.removeprefix(f'{block}.')}.base.{leaf}": tensor
        for path, base in layers.items()
        for leaf, tensor in base.state_dict().items()
    }
    own = [path.removeprefix(f"{block}.") for path in layers]
    replaced = tuple(f"{path}.base." for path in own)
    dense = {f"{path}.weight" for path in own}
    kept = [name for name in source.record(block).tensors if name not in dense and not name.startswith(replaced)]
    return {**found, **{name: source.tensor(f"{block}.{name}") for name in kept}}

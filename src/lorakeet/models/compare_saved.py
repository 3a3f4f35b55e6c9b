"""Compares an adapter on a model with its file and with the model that read it: the same names, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.layers.extras import TrainedRows
from lorakeet.core.lowrank import LoraPair
from lorakeet.models.inject import adapter_parts


@dataclass(frozen=True)
class SavedDifference:
    """Names of tensors that are in one place only, or have other numbers in one of them; `count` are those that were trained."""

    count: int
    not_saved: tuple[str, ...]
    only_saved: tuple[str, ...]
    not_loaded: tuple[str, ...]
    only_loaded: tuple[str, ...]
    changed: tuple[str, ...]


def compare_saved(live: tuple[nn.Module, str], saved: Adapter, loaded: tuple[nn.Module, str]) -> SavedDifference:
    """Compares the adapter on one model, by name, with `saved` and with that on another (or the same) model.

    One pair of each is in memory at a time, beside `saved`.
    """
    on_disk = {name: tensor for path, pair in saved.pairs.items() for name, tensor in _of_pair(path, pair)}
    on_disk.update(saved.extras)
    on_disk.update({f"{path}.rows": rows.rows for path, rows in saved.token_rows.items()})
    trained: set[str] = set()
    again: set[str] = set()
    changed: set[str] = set()
    others = dict(adapter_parts(*loaded))
    for path, part in adapter_parts(*live):
        mine = dict(_of_part(path, part))
        other = dict(_of_part(path, others[path])) if path in others else {}
        trained |= mine.keys()
        changed |= {name for name, tensor in mine.items() if not (_same(name, tensor, on_disk) and _same(name, tensor, other))}
    for path, part in others.items():
        again |= {name for name, _ in _of_part(path, part)}

    def only(left: set[str], right: set[str]) -> tuple[str, ...]:
        return tuple(sorted(left - right))

    stored = set(on_disk)
    return SavedDifference(
        len(trained), only(trained, stored), only(stored, trained), only(trained, again), only(again, trained),
        tuple(sorted(changed)),
    )  # fmt: skip


def _same(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> bool:
    """True if another place has these very numbers, or no tensor of the name, which is counted apart."""
    other = others.get(name)
    return other is None or torch.equal(tensor, other.detach().float().cpu())


def _of_part(path: str, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, LoraPair):
        if part.rank:
            yield from _of_pair(path, part.value())
    elif isinstance(part, TrainedRows):
        yield f"{path}.rows", part.values.detach().float().cpu()
    else:
        for key, parameter in part.named_parameters():
            yield f"{path}.{key}", parameter.detach().float().cpu()


def _of_pair(path: str, pair: Pair) -> Iterator[tuple[str, Tensor]]:
    named = {"A": pair.A, "B": pair.B, "magnitude": pair.magnitude, "bias": pair.bias}
    yield from ((f"{path}.{name}", tensor) for name, tensor in named.items() if tensor is not None)

"""A store of random weights in a model's true shapes, for measuring what a model of that size takes where it cannot be had."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakeet.memory.store import new_store
from lorakeet.models.families import Family
from lorakeet.models.files.packing import packing_of
from lorakeet.models.streaming.load import empty_model, records_of
from lorakeet.quant.construct import empty_base, quantise_weight
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec

SPREAD = 0.02  # standard deviation of the weights, as models are initialised
GPTQ_SCALE = 0.004  # of uniform 4-bit codes: about that spread


def write_random_store(
    path: Path, config: Any, dtype: torch.dtype, *, quantize: QuantSpec, family: Family, seed: int = 0
) -> dict[str, str]:
    """Writes the store of the model that `config` describes and returns its identity; one block is in memory at a time.

    One normal matrix of each shape is packed as `quantize` asks; in GPTQ, where `config` says so, one has random codes. The other
    matrices of that shape have its scales, and codes drawn anew from a uniform distribution: they are as large and as much work
    as a real model's, which is all they are for.
    """
    model = empty_model(config, dtype)
    chosen = packing_of(model, config, quantize)
    draw = _Draw(np.random.default_rng(seed), quantize)
    identity = {"model": f"random {seed}", "dtype": str(dtype).removeprefix("torch."), "packing": quantize.method}
    settings: dict[str, Any] = {}
    records = records_of(model, family)
    inside = {name for names in records.values() for name in names}
    state = model.state_dict(keep_vars=True)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    shapes = {name: tensor for name, tensor in state.items() if name not in tied}
    with new_store(path, identity=identity, tensors=8 * len(shapes)) as writer:
        for name, like in shapes.items():
            if name not in inside:
                writer.add(name.rpartition(".")[0], {name.rpartition(".")[2]: draw.dense(like)})
        for record, names in records.items():
            held: dict[str, Tensor] = {}
            for name in sorted(names):
                path_in_model, leaf = name.removesuffix(".weight"), name.removeprefix(f"{record}.")
                if path_in_model in chosen and name.endswith(".weight"):
                    base = draw.packed(shapes[name], chosen[path_in_model])
                    settings[path_in_model] = base.settings
                    place = leaf.removesuffix(".weight")
                    held.update({f"{place}.base.{key}": tensor.clone() for key, tensor in base.state_dict().items()})
                else:
                    held[leaf] = draw.dense(shapes[name])
            writer.add(record, held)
        identity["packed"] = json.dumps(settings)
    return identity


class _Draw:
    """Random tensors, dense and packed."""

    def __init__(self, random: np.random.Generator, quantize: QuantSpec) -> None:
        self.random, self.quantize = random, quantize
        self._made: dict[tuple[int, int], PackedBase] = {}
        self._torch = torch.Generator().manual_seed(int(random.integers(2**31)))

    def dense(self, like: Tensor) -> Tensor:
        """Normal numbers for a matrix, ones for the gain of a norm."""
        if like.dim() < 2:
            return torch.ones(like.shape, dtype=like.dtype)
        parts: list[Tensor] = []
        for rows in _parts(like.shape[0]):
            parts.append(torch.randn(rows, *like.shape[1:], generator=self._torch).mul_(SPREAD).to(like.dtype))
        return torch.cat(parts)

    def packed(self, like: Tensor, settings: Mapping[str, Any]) -> PackedBase:
        """A packed matrix; valid until the next of its shape."""
        shape = (like.shape[0], like.shape[1])
        base = self._made.get(shape)
        if base is None:
            base = self._made[shape] = self._first(shape, settings)
            return base
        codes = max(base.buffers(), key=lambda buffer: buffer.nbytes)
        codes.view(torch.uint8).view(-1).copy_(torch.frombuffer(bytearray(self.random.bytes(codes.nbytes)), dtype=torch.uint8))
        return base

    def _first(self, shape: tuple[int, int], settings: Mapping[str, Any]) -> PackedBase:
        if settings["method"] != "gptq":
            return quantise_weight(torch.randn(shape, generator=self._torch).mul_(SPREAD), self.quantize)
        base = empty_base(settings)
        assert isinstance(base, GptqBase)
        base.qweight.random_(generator=self._torch)
        base.qzeros.random_(generator=self._torch)
        base.scales.fill_(GPTQ_SCALE)
        return base


def _parts(rows: int, most: int = 4096) -> list[int]:
    return [min(most, rows - start) for start in range(0, rows, most)]

"""The base that a quantised run computed with, as dense numbers: what packing makes of each weight on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lorakeet.models import modules
from lorakeet.models.load import read_config
from lorakeet.models.quantized import owners, packable, skeleton
from lorakeet.models.stock import tensor_files
from lorakeet.quant.adopt import quantised
from lorakeet.quant.spec import QuantSpec


def roundings(source: Path, spec: QuantSpec) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each weight in the folder `source` that `spec` packs, by its name on disk: the weight to what its packed form means.

    A function gives fp32, and is meant for the numbers as they are stored, which packing at load reads too.
    """
    config = read_config(source)
    plain = skeleton(config)
    chosen = packable(plain, head=spec.head == "quantize")
    places = owners(plain, tensor_files(source))
    found = {name: chosen[path] for name, path in places.items() if path in chosen}
    return {name: _rounding(modules.kind_of(module) == "conv1d", spec) for name, module in found.items()}


def _rounding(transposed: bool, spec: QuantSpec) -> Callable[[Tensor], Tensor]:
    def rounded(weight: Tensor) -> Tensor:
        dense = quantised(weight.t() if transposed else weight, spec).dense()
        return dense.t().contiguous() if transposed else dense

    return rounded

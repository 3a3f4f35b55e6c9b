"""DoRA pairs made plain, for formats without magnitudes: the change of the weight that they amount to, compressed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.dora import DoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.errors import ConfigError
from lorakeet.formats.diffusion.dense import Compression, fit_pair
from lorakeet.formats.files.base_model import BaseModel


def fold_dora(adapter: Adapter, base: BaseModel | None, compression: Compression, say: Callable[[str], None]) -> Adapter:
    """`adapter` with plain pairs in place of DoRA's; `say` hears rank and relative error of each. Reads one weight at a time.

    ConfigError where the base's weights are not at hand: ‖W + s·B·A‖ needs them.
    """
    dora = {path: pair for path, pair in adapter.pairs.items() if pair.magnitude is not None}
    missing = [path for path in dora if base is None or path not in base.weights]
    if base is None or missing:
        raise ConfigError(
            f"DoRA's magnitudes can only be folded with the weights of the base, which are missing for {', '.join(missing[:3])} "
            f"({len(missing)} modules). Name the folder of the base, with its safetensors files, with --base."
        )
    folded: dict[str, Pair] = {}
    for path, pair in dora.items():
        weight = base.weight(path)
        shape = (pair.B.shape[0], *pair.A.shape[1:])  # a Plan counts GPT-2's transposed weights as (out, in) too
        module = DoraPair(PlanEntry(path, pair.kind, shape, pair.rank, pair.alpha, pair.scale_rule, "dora"))
        module.load(pair)
        change = module.fold(weight).detach() - weight
        plain, error = fit_pair(change.t() if pair.kind == "conv1d" else change, compression)
        folded[path] = dataclasses.replace(plain, kind=pair.kind)
        say(f"{path}: DoRA folded into a plain pair of rank {plain.rank}, relative error {error:.2g}")
    return dataclasses.replace(adapter, pairs={**adapter.pairs, **folded})

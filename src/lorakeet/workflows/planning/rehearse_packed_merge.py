"""A merge into a quantised model rehearsed on shapes: its blocks folded and rounded, and the steps of its finish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.data.chat import Example
from lorakeet.memory.spill import Spill
from lorakeet.memory.usage import Usage
from lorakeet.merge.requantise import Latent, Requantised, bytes_of_rounding
from lorakeet.models.fuse import unfuse
from lorakeet.models.modules import find, kind_of
from lorakeet.models.modules import replace as put
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.folded_weights import fold_layers
from lorakeet.models.text.from_config import ShapeBase
from lorakeet.models.text.gptq_blocks import LayerSource, pack_blocks
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.repeated_blocks import run_each_kind
from lorakeet.quant.construct import empty_base
from lorakeet.quant.grids import FixedGrid, Nf4Grid, UniformGrid
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.quantisation_aware import quantisation_aware_finish
from lorakeet.workflows.planning.rehearse_text import on_shapes
from lorakeet.workflows.runs.open_adapter import NAME

ROUND, FINISHING = "round", "finish"


def rehearse_rounding(
    build: Callable[[], TextModel],
    plan: Plan,
    rows: Sequence[Example],
    packing: Mapping[str, Mapping[str, Any]],
    spill: Callable[[], Spill] = Spill,
) -> Usage:
    """The peak while the first blocks of each kind are folded and rounded on calibration rows.

    `packing` tells how each layer will be packed, `spill` where the rows' states are.
    """
    with on_shapes() as ledger:
        text = build()
        text = initialise_adapter(text, plan, seed=0)
        unfuse(text.model)
        ledger.name("base", [*text.model.parameters(), *text.model.buffers()])
        stays = [] if text.streamed is not None else [*text.model.parameters(), *text.model.buffers()]
        text.release()

        def layers_of(block: str) -> dict[str, nn.Module]:
            return {path: cast(nn.Module, find(text.model, path)) for path in packing if path.startswith(f"{block}.")}

        def fold(path: str) -> nn.Module:
            fold_layers(text.model, NAME, [path])
            return cast(nn.Module, find(text.model, path))

        def pack(path: str, weight: Tensor, *_: object) -> PackedBase:
            base = ShapeBase(empty_base(packing[path]))
            torch.empty(bytes_of_rounding(weight.numel(), packing[path]["method"], base.bytes), dtype=torch.uint8)
            return base

        blocks = pack_blocks(text, rows, pack, LayerSource(layers_of, fold), keep=True, spill=spill)
        with ledger.phase(ROUND):
            run_each_kind(blocks, text.model, text.family)
        ledger.close()
        stays.clear()
        return ledger.peaks[ROUND]


def rehearse_finish(
    build: Callable[[], TextModel],
    adapter: Adapter,
    packing: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Example],
    spec: TrainSpec,
    products: torch.dtype,
) -> Usage:
    """The peak while the pairs of `adapter` are trained through the grids of layers packed as `packing` says."""
    with on_shapes() as ledger:
        text = build()
        unfuse(text.model)
        solved: dict[str, Requantised] = {}
        for path, settings in packing.items():
            base = ShapeBase(empty_base(settings))
            standing = cast(Any, find(text.model, path))
            put(text.model, path, PackedLinear(base, standing.bias, transposed=kind_of(standing) == "conv1d"))
            latent = Latent(outlined_grid(base), torch.empty(base.shape)) if path in adapter.pairs else None
            solved[path] = Requantised(base, latent, "kept", 0.0)
            del standing
        pairs = {
            path: replace(pair, A=torch.empty(pair.A.shape), B=torch.empty(pair.B.shape))
            for path, pair in adapter.pairs.items()
        }
        ledger.name("base", [*text.model.parameters(), *text.model.buffers()])
        with ledger.phase(FINISHING):
            quantisation_aware_finish(
                text, solved, replace(adapter, pairs=pairs), rows, steps=2, spec=spec, products=products,
                on_step=lambda step, loss: None,
            )  # fmt: skip
        ledger.close()
        return ledger.peaks[FINISHING]


def outlined_grid(base: PackedBase) -> FixedGrid:
    """The grid of a base that has shapes alone, as large as `quant/grids.grid_of` makes it."""
    settings, (out, width) = base.settings, base.shape
    if settings["method"] == "nf4":
        return Nf4Grid(torch.empty(base.shape), lambda codes: base)
    finest = 16 if settings.get("type") == "Q6_K" else 32  # numbers under a scale of GGUF's types
    groups = int(settings["groups"]) if settings["method"] == "gptq" else width // finest
    step, inverse, offset = (torch.empty(groups, out) for _ in range(3))
    return UniformGrid(step, inverse, offset, [column * groups // width for column in range(width)], 15, lambda codes: base)

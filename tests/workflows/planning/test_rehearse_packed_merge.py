"""What stands in a rehearsal for the parts of a merge into packed weights is as large as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.memory.spill import Spill
from lorakeet.models.files.packing import packing_of
from lorakeet.models.streaming.load import empty_model
from lorakeet.models.targets import plan_for
from lorakeet.models.text.from_config import model_from_config, streamed_model_from_config
from lorakeet.quant import gguf_codes
from lorakeet.quant.construct import empty_base
from lorakeet.quant.gguf_codes import HIGHEST
from lorakeet.quant.grids import FixedGrid, Nf4Grid, UniformGrid, grid_of
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.planning.rehearse_packed_merge import outlined_grid, rehearse_rounding
from lorakeet.workflows.planning.rehearse_text import RowShape, made_up_rows
from tiny.models import tiny_model

WEIGHT = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


def shapes(grid: FixedGrid) -> list[Any]:
    if isinstance(grid, Nf4Grid):
        return [grid.largest.shape]
    assert isinstance(grid, UniformGrid)
    return [part.shape for part in (grid.step, grid.inverse, grid.offset)] + [grid.group_of]


def gptq(groups: int) -> PackedBase:
    base = empty_base({"method": "gptq", "shape": (64, 512), "bits": 4, "groups": groups, "sym": True, "zero_format": "gptq"})
    base.store(WEIGHT)
    return base


@pytest.mark.parametrize("base", [Nf4Base.of(WEIGHT), gptq(8), gptq(1)], ids=["nf4", "gptq", "whole rows"])
def test_a_grid_of_shapes_is_as_large_as_the_real_one(base: PackedBase) -> None:
    assert shapes(outlined_grid(base)) == shapes(grid_of(base))


@pytest.mark.parametrize("kind", list(HIGHEST))
def test_so_is_that_of_each_type_of_gguf(kind: str) -> None:
    base = gguf_codes.fit_gguf_scales(WEIGHT, kind)
    assert shapes(outlined_grid(base)) == shapes(grid_of(base))


def test_rounding_holds_what_its_rows_and_its_blocks_take() -> None:
    """More tokens hold more; a streamed model holds less by the blocks that are not there."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5}
    config = tiny_model("llama", **wide).config
    empty = empty_model(config, torch.float32)
    plan = plan_for(
        empty, LoraSpec(rank=4), model_from_config(config, name="m", dtype=torch.float32, products=torch.float32).family
    )
    packing = packing_of(empty, config, QuantSpec(method="nf4"))

    def held(make: Any, rows: RowShape) -> int:
        build = partial(make, config, name="m", dtype=torch.float32, products=torch.float32)
        return rehearse_rounding(build, plan, made_up_rows(rows), packing, Spill).bytes

    few, many = (held(model_from_config, RowShape(60, count)) for count in (4, 12))
    assert many - few >= 4 * 8 * 60 * 128, "the states of eight rows more"
    block = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert 2 * block < few - held(streamed_model_from_config, RowShape(60, 4)) < 5 * block

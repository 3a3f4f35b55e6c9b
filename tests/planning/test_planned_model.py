"""`planning.planned_model`: the model that a plan rehearses is a run's, with all of its blocks or a few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lorakeet.models.recomputed import RecomputedBlock
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.repeated_blocks import ModelBuilder, blocks_of
from lorakeet.planning.planned_model import Precision, builder_of
from lorakeet.planning.rehearse_text import on_shapes
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import RESIDENT, Way
from tiny.configs import SMALL

PRECISION = Precision(torch.float32, torch.float32, QuantSpec())


def builder(way: Way = RESIDENT, precision: Precision = PRECISION) -> ModelBuilder:
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 6})
    return builder_of(ModelSpec(path="small"), way, config, precision, None)


@pytest.mark.parametrize(("blocks", "made"), [(None, 6), (2, 2)])
def test_it_has_all_blocks_or_the_first_ones(blocks: int | None, made: int) -> None:
    with on_shapes():
        text = builder()(blocks)
        assert len(blocks_of(text.model, text.family)) == made and text.streamed is None


def test_blocks_are_streamed_or_computed_again_as_the_way_says() -> None:
    kinds = {}
    for name, way in {"resident": RESIDENT, "streamed": Way(streamed=True), "recomputed": Way(recomputed=True, slots=4)}.items():
        with on_shapes():
            text = builder(way)()
            kinds[name] = text.streamed is not None, sum(isinstance(module, RecomputedBlock) for module in text.model.modules())
    assert kinds == {"resident": (False, 0), "streamed": (True, 0), "recomputed": (False, 2)}


def test_its_key_names_all_that_it_depends_on() -> None:
    def key(**given: Any) -> str:
        found = builder(**given).key
        assert found is not None
        return repr(found())

    others = {"way": Way(streamed=True)}, {"precision": Precision(torch.bfloat16, torch.float32, QuantSpec())}
    assert key() == key() and len({key(), *(key(**other) for other in others)}) == 3

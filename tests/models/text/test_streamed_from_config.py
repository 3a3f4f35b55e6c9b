"""A streamed model of shapes alone: every family's, with the places of the real one, and in a ledger only what is in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lorakeet.core.spec import LoraSpec
from lorakeet.memory.ledger import Ledger
from lorakeet.memory.store import LINE
from lorakeet.models.text.from_config import model_from_config
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.models.text.streamed_from_config import streamed_model_from_config
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.spec import TrainSpec
from lorakeet.workflows.planning.rehearse_text import STEP, Rehearsal, RowShape, rehearse
from lorakeet.workflows.runs.residency import Way
from tiny.models import FAMILIES, save_tiny_llama, tiny_model
from tiny.streams import loaded

DTYPES = {"dtype": torch.float32, "products": torch.float32}


def rehearsed(config: object, way: Way, batches: int = 2, **changes: object) -> Rehearsal:
    build = ModelBuilder(partial(streamed_model_from_config, name="made-up", **{**DTYPES, **changes}), config)
    return rehearse(build, LoraSpec(rank=2), TrainSpec(), rows=RowShape(32, 2), micro_batches=batches, way=way)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rehearsed_and_holds_less_than_resident(family: str) -> None:
    config = tiny_model(family).config
    resident = rehearse(
        partial(model_from_config, config, name="made-up", **DTYPES), LoraSpec(rank=2), TrainSpec(), rows=RowShape(32, 2)
    )
    streamed = rehearsed(config, Way(True, together=1, spilled=True))
    assert streamed.plan == resident.plan
    assert streamed.peaks[STEP].bytes < resident.peaks[STEP].bytes
    assert resident.blocks == 0 and streamed.blocks == config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_its_places_are_as_large_as_those_of_the_loaded_model(method: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=5)
    real = loaded(folder, tmp_path / "store", method=method)
    assert real.streamed is not None
    with Ledger() as ledger:
        text = streamed_model_from_config(
            AutoConfig.from_pretrained(folder), name="x", quantize=QuantSpec(method=method), **DTYPES  # type: ignore[arg-type]
        )
        assert text.streamed is not None
        size, tensors = text.streamed.stream.slot_bytes, len(text.streamed.stream.records[0].tensors)
        assert abs(size - real.streamed.stream.slot_bytes) < LINE * tensors  # they may stand in another order
        before = ledger.bytes
        assert len(text.streamed.stream.fill()) == 2
        assert ledger.bytes - before == 2 * size


def test_products_in_int8_are_rehearsed() -> None:
    config = tiny_model("llama").config
    exact, coded = (
        rehearsed(config, Way(True, together=1), quantize=QuantSpec(method="int8", int8_products=products))
        for products in (False, True)
    )
    assert coded.block_bytes == exact.block_bytes and coded.peaks[STEP].bytes != exact.peaks[STEP].bytes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_over_a_mask_is_rehearsed_too_and_holds_more(attention: str) -> None:
    config = tiny_model("llama").config
    by_rows = rehearsed(config, Way(True, together=1)).peaks[STEP].bytes
    assert rehearsed(config, Way(True, together=1), attention=attention).peaks[STEP].bytes > by_rows


def test_inputs_on_disk_and_fewer_batches_together_hold_less() -> None:
    config = tiny_model("llama").config
    config.num_hidden_layers = 6
    kept = rehearsed(config, Way(True, together=2)).peaks[STEP].bytes
    one = rehearsed(config, Way(True, together=1)).peaks[STEP].bytes
    spilled = rehearsed(config, Way(True, together=1, spilled=True)).peaks[STEP].bytes
    assert spilled < one < kept

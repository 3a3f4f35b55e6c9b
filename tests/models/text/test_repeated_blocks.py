"""A few blocks that stand for all: what is planned from them is what is planned from every one, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers

from lorakeet.core.spec import LoraSpec
from lorakeet.models.families import family_of
from lorakeet.models.targets import plan_for
from lorakeet.models.text.from_config import model_from_config, streamed_model_from_config
from lorakeet.models.text.repeated_blocks import (
    ModelBuilder,
    count_repeated_blocks,
    first_blocks_of_config,
    first_blocks_of_plan,
    last_new_kind_of_block,
)
from lorakeet.planning import rehearse_text
from lorakeet.planning.rehearse_text import STEP, EvaluationSize, Rehearsal, RowShape, rehearse
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import RESIDENT, Way
from lorakeet.train.spec import TrainSpec
from tiny.models import FAMILIES, tiny_model

BLOCKS = 6
ALIKE = ("qwen3_moe", "gpt2")
LORA = LoraSpec(rank=2, alpha=4)


def config_of(family: str, blocks: int = BLOCKS) -> Any:
    name, _, settings = FAMILIES[family]
    return getattr(transformers, name)(**{**settings, "n_layer" if family == "gpt2" else "num_hidden_layers": blocks})


def rehearsed(config: Any, lora: LoraSpec = LORA, way: Way = RESIDENT, **settings: Any) -> Rehearsal:
    method = settings.pop("quantize", "none")
    make = partial(
        streamed_model_from_config if way.streamed else model_from_config, name="made-up", dtype=torch.bfloat16,
        products=torch.float32,
        quantize=QuantSpec(method=method),
    )  # fmt: skip
    together = max(1, way.together)
    return rehearse(
        ModelBuilder(make, config), lora, TrainSpec(**settings), rows=RowShape(32, 2), micro_batches=max(2, together),
        evaluation=EvaluationSize(RowShape(48, 1), 4, 8), way=way,
    )  # fmt: skip


def both(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **settings: Any) -> tuple[Rehearsal, Rehearsal]:
    """Planned from a few blocks, which is seen to have happened, and from all."""
    ran: list[int] = []
    usual = rehearse_text.extrapolate_peaks

    def noted(*given: Any, wanted: int) -> Any:
        ran.append(wanted)
        return usual(*given, wanted=wanted)

    monkeypatch.setattr(rehearse_text, "extrapolate_peaks", noted)
    found = rehearsed(*arguments, **settings)
    assert ran == [BLOCKS]
    monkeypatch.setattr(rehearse_text, "count_repeated_blocks", lambda *_: 0)
    return found, rehearsed(*arguments, **settings)


def require_equal(few: Rehearsal, every: Rehearsal) -> None:
    """The same plan; the peaks are the same or, where a loop over all blocks is bounded by its ends, a thousandth above."""
    for name, peak in every.peaks.items():
        if name:
            assert peak.bytes <= few.peaks[name].bytes <= 1.001 * peak.bytes, name
    assert few.peaks[STEP] == every.peaks[STEP], "kinds and heap too"
    assert few.work.flops == every.work.flops and abs(few.work.written - every.work.written) <= 1  # of a micro-batch, rounded
    assert replace(few, peaks={}, work=every.work, alike=every.alike) == replace(every, peaks={})


@pytest.mark.slow
@pytest.mark.parametrize("family", ALIKE)
def test_every_family_of_equal_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_equal(*both(monkeypatch, config_of(family)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "way"),
    [("nf4", Way(True, together=3)), ("int8", Way(True, together=1, spilled=True))],
    ids=str,
)  # fmt: skip
def test_every_way_to_keep_weights(quantize: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    require_equal(*both(monkeypatch, config_of("llama"), way=way, quantize=quantize))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        replace(LORA, variant="dora", dropout=0.1),
        replace(LORA, target_modules=("q_proj",), extra_modules=("lm_head",)),
    ],
    ids=["dora", "attention"],
)  # fmt: skip
def test_every_kind_of_adapter(lora: LoraSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    require_equal(*both(monkeypatch, config_of("llama"), lora))


@pytest.mark.parametrize(
    ("family", "lora"),
    [("gemma2", LORA), ("gemma3", LORA), ("llama", replace(LORA, rank_pattern={"layers.3.self_attn.q_proj": 4})),
     ("llama", replace(LORA, layers="top:3")), ("llama", replace(LORA, exclude_modules=("model.layers.0.mlp.up_proj",)))],
)  # fmt: skip
def test_blocks_that_differ_are_all_rehearsed(family: str, lora: LoraSpec) -> None:
    model = tiny_model(family, num_hidden_layers=BLOCKS)
    found = family_of(model.config)
    assert count_repeated_blocks(model, found, plan_for(model, lora, found)) == 0
    assert family != "llama" or count_repeated_blocks(model, found, plan_for(model, LORA, found)) == BLOCKS


def test_the_first_blocks_of_a_model_and_of_its_plan() -> None:
    model = tiny_model("qwen2", num_hidden_layers=BLOCKS)
    family = family_of(model.config)
    plan = plan_for(model, LORA, family)
    config = first_blocks_of_config(model.config, 3)
    assert config.num_hidden_layers == 3 and len(config.layer_types) == 3 and model.config.num_hidden_layers == BLOCKS
    fewer = transformers.AutoModelForCausalLM.from_config(config)
    assert first_blocks_of_plan(plan, fewer, family).entries == plan_for(fewer, LORA, family).entries


def test_the_last_block_of_a_new_kind_is_found() -> None:
    found = {}
    for family in ("llama", "gemma2"):
        model = tiny_model(family)
        found[family] = last_new_kind_of_block(model, family_of(model.config.get_text_config()))
    assert found == {"llama": 0, "gemma2": 1}  # every other block of Gemma attends to all tokens

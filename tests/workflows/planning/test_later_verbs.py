"""Merging and exporting in a plan: the same forecast as the check itself makes when there is an adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.models.families import family_of
from lorakeet.models.streaming.load import empty_model
from lorakeet.models.targets import plan_for
from lorakeet.models.text.from_config import config_from_settings
from lorakeet.workflows.planning.check import ModelCheck
from lorakeet.workflows.planning.later_verbs import later_phases, with_later
from lorakeet.workflows.planning.rehearse_text import NotPlanned

SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def planned(**changes: Any) -> tuple[RunConfig, Any, Plan]:
    given = {"model.path": "made-up", "data.train": "none", "lora.rank": "4", "lora.alpha": "12", "data.max_tokens": "64"}
    config = config_from_settings({**SHAPE, **changes})
    model = empty_model(config, torch.float32)
    return read_run(None, given), config, plan_for(model, LoraSpec(rank=4), family_of(config))


def test_what_fits_stays_in_memory_and_what_does_not_is_streamed() -> None:
    config, model, plan = planned()
    roomy, tight = later_phases(config, model, plan, Budget()), later_phases(config, model, plan, Budget(1, "1"))
    assert [phase.name for phase in roomy] == [phase.name for phase in tight] == ["merge", "export"]
    weights = 4 * plan.frozen_parameters
    for whole, streamed, models in zip(roomy, tight, (2, 1), strict=True):
        assert whole.kinds["base"] >= models * weights, "each model whole, in fp32"
        assert streamed.kinds.get("base", 0) < models * weights / 2 and streamed.bytes < whole.bytes


def test_a_packed_model_is_merged_into_its_dense_one() -> None:
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
    config, model, plan = planned()
    _, packed, _ = planned(quantization_config=stored)
    both = zip(later_phases(config, packed, plan, Budget(1, "1")), later_phases(config, model, plan, Budget(1, "1")), strict=True)
    for found, expected in both:
        assert {**found.kinds, "runtime": 0} == {**expected.kinds, "runtime": 0}


def test_new_tokens_are_planned_too() -> None:
    config, model, _ = planned()
    more = replace(config, lora=replace(config.lora, new_tokens=("<one>", "<two>")))
    plan = plan_for(empty_model(model, torch.float32), more.lora, family_of(model))
    assert [phase.name for phase in later_phases(more, model, plan, Budget(1, "1"))] == ["merge", "export"]


def test_phases_take_the_place_of_those_of_the_same_name() -> None:
    before = Forecast((Phase("train step", {"base": 5}), Phase("merge", {"base": 9})))
    assert with_later(before, (Phase("merge", {"base": 2}),)).phases == (before.phases[0], Phase("merge", {"base": 2}))
    assert with_later(before, ()) == before


def test_a_model_that_cannot_be_followed_keeps_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise NotPlanned("experts")

    monkeypatch.setattr(ModelCheck, "plan", refused)
    config, model, plan = planned()
    assert later_phases(config, model, plan, Budget(1, "1")) == ()

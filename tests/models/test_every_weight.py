"""Every tensor of a model is in its plan, once, and each without a pair says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from lorakeet.core.plan import ModelWeight, Plan
from lorakeet.models.inject import inject
from lorakeet.models.modules import replace
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedLinear
from tiny.models import tiny_model
from tiny.outlines import OUTLINES, outline

Planned = Callable[..., Plan]


def reasons(plan: Plan, group: str) -> set[str]:
    return {weight.why_not for weight in plan.weights if weight.group == group}


@pytest.mark.parametrize("name", OUTLINES)
def test_the_weights_of_a_plan_are_those_of_the_model(planned: Planned, name: str) -> None:
    model = outline(name)
    plan = planned(model)
    parameters = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    named = {path.removesuffix(".weight"): path for path in parameters}
    places = [path if path in parameters else named[path] for path in (weight.path for weight in plan.weights)]
    assert sorted(places) == sorted(parameters)
    paired = {entry.path for entry in plan.entries}
    assert paired == {weight.path for weight in plan.weights if not weight.why_not}


def test_each_reason_is_named(planned: Planned) -> None:
    model = tiny_model("qwen2_moe")
    plan = planned(model, exclude_modules=("o_proj",), layers="0")
    assert reasons(plan, "attention") == {"", "in lora.exclude_modules", "outside lora.layers 0"}
    assert reasons(plan, "head") == {"the head, adapted by name only"}
    assert reasons(plan, "embeddings") == {"an embedding, adapted by name only"}
    assert reasons(plan, "router") == {"a router, adapted by name only", "no pair fits a Qwen2MoeTopKRouter"}
    assert reasons(planned(model, target_modules=("attention",)), "experts") == {"not in lora.target_modules"}
    assert reasons(planned(outline("mamba2")), "Mamba") == {"", "refused by PEFT, adapted by name only"}
    assert reasons(planned(outline("qwen3_next")), "convolution") == {"no pair fits a Conv1d"}


def test_stacked_experts_are_counted(planned: Planned) -> None:
    stacks = [weight for weight in planned(tiny_model("mixtral")).weights if weight.group == "experts"]
    assert [weight.experts for weight in stacks] == [4] * 4


def test_biases_of_stacked_experts_are_vectors(planned: Planned) -> None:
    groups = Counter(weight.group for weight in planned(outline("gpt_oss")).weights)
    assert groups["experts"] == 8 and groups["attention"] == 16


def test_packed_weights_and_adapted_modules_are_counted_once(planned: Planned) -> None:
    model = tiny_model("llama")
    plan = planned(model)
    layer = model.model.layers[0].mlp.up_proj
    replace(model, "model.layers.0.mlp.up_proj", PackedLinear(Nf4Base.of(layer.weight)))
    packed = planned(model)
    assert Counter(packed.weights) == Counter(plan.weights)
    inject(model, packed)
    assert planned(model).weights == plan.weights


def test_the_plan_in_json_leaves_them_out(planned: Planned) -> None:
    plan: Any = planned(tiny_model("llama"))
    assert "weights" not in plan.to_mapping() and isinstance(plan.weights[0], ModelWeight)

"""`export.deployment`: what each runtime does with each feature, before and after training alike."""

from __future__ import annotations

import typing

import pytest
import torch

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.core.spec import LoraSpec
from lorakeet.export.deployment import LIMITS, Feature, Runtime, features_of_adapter, features_of_spec, limits_of


def pair(rank: int = 4, alpha: float = 12.0, **more: typing.Any) -> Pair:
    return Pair(torch.zeros(rank, 8), torch.zeros(8, rank), alpha, **more)


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"rank": 4, "alpha": 12.0}, set()),
        ({"rank": 64}, {"rank above 16"}),
        ({"rank": 1024}, {"rank above 512"}),
        ({"rank_pattern": {"q_proj": 4}}, {"several ranks", "several scales"}),
        ({"alpha_pattern": {"q_proj": 4.0}}, {"several scales"}),
        ({"scale_rule": "alpha/sqrt(rank)"}, {"rsLoRA"}),
        ({"variant": "dora"}, {"DoRA"}),
        ({"extra_modules": ("lm_head",)}, {"whole modules"}),
        ({"new_tokens": ("<x>",)}, {"new tokens"}),
        ({"target_modules": ("q_proj", "embed_tokens", "lm_head")}, {"embedding pairs", "head pairs"}),
        ({"target_modules": ("mlp.experts.gate_up_proj",)}, {"expert pairs"}),
    ],
)
def test_features_of_settings(settings: dict[str, typing.Any], features: set[str]) -> None:
    assert features_of_spec(LoraSpec(**settings)) == features


def test_features_of_a_finished_adapter() -> None:
    rows = TokenRows((3,), torch.zeros(1, 8))
    one = Adapter({"a.q_proj": pair(), "a.k_proj": pair(8), "lm_head": pair(magnitude=torch.ones(8))}, token_rows={"e": rows})
    assert features_of_adapter(one) == {"several ranks", "several scales", "DoRA", "head pairs", "new tokens"}
    assert features_of_adapter(Adapter({"q_proj": pair(), "k_proj": pair(8, 24.0)})) == {"several ranks"}
    assert features_of_adapter(Adapter({"q_proj": pair(scale_rule="alpha/sqrt(rank)", bias=torch.ones(8))})) == {
        "rsLoRA",
        "bias in the pairs",
    }


def test_peft_loads_everything_and_others_say_why_not() -> None:
    everything = typing.get_args(Feature)
    assert limits_of("peft", everything) == ()
    vllm = [(limit.feature, limit.effect) for limit in limits_of("vllm", {"DoRA", "several scales", "rank above 16"})]
    assert vllm == [("DoRA", "refused"), ("several scales", "wrong"), ("rank above 16", "note")]
    assert limits_of("ollama", {"rsLoRA", "several scales", "several ranks"}) == ()  # GGUF adapters carry the true scale
    assert [limit.feature for limit in limits_of("llama.cpp", {"whole modules"})] == ["whole modules"]


def test_every_row_of_the_table_is_whole() -> None:
    for limit in LIMITS:
        assert limit.runtime in typing.get_args(Runtime) and limit.feature in typing.get_args(Feature)
        assert limit.source and limit.remedy.endswith(".") and limit.what and not limit.what.endswith(".")
    assert len({(limit.runtime, limit.feature) for limit in LIMITS}) == len(LIMITS)

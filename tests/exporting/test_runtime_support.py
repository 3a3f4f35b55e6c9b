"""`export.deployment`: what each runtime does with each feature, before and after training alike."""

from __future__ import annotations

import json
import typing

import pytest
import torch

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.core.math import Kind
from lorakeet.core.plan import ExtraEntry, Plan, PlanEntry
from lorakeet.exporting.runtime_support import (
    LIMITS,
    VLLM_TRIED,
    Feature,
    Runtime,
    features_of_adapter,
    features_of_plan,
    has_head,
    limits_of,
)
from structure.tree import ROOT


def pair(rank: int = 4, alpha: float = 12.0, **more: typing.Any) -> Pair:
    return Pair(torch.zeros(rank, 8), torch.zeros(8, rank), alpha, **more)


def entry(path: str, kind: Kind = "linear", rank: int = 4, alpha: float = 12.0, **more: typing.Any) -> PlanEntry:
    return PlanEntry(path, kind, (4, 64, 64) if kind == "experts" else (1024, 2048), rank, alpha, **more)


PLANS: list[tuple[list[PlanEntry], set[str]]] = [
    ([entry("q_proj"), entry("k_proj")], set()),
    ([entry("q_proj", rank=64)], {"rank above 16"}),
    ([entry("q_proj", rank=1024)], {"rank above 512"}),
    ([entry("q_proj"), entry("k_proj", rank=8)], {"several ranks", "several scales"}),
    ([entry("q_proj"), entry("k_proj", rank=8, alpha=24.0)], {"several ranks"}),
    ([entry("q_proj"), entry("k_proj", alpha=4.0)], {"several scales"}),
    ([entry("q_proj", scale_rule="alpha/sqrt(rank)")], {"rsLoRA"}),
    ([entry("q_proj", variant="dora")], {"DoRA"}),
    ([entry("wte", "embedding"), entry("lm_head")], {"embedding pairs", "tied head pairs"}),
    ([entry("mlp.experts.gate_up_proj", "experts")], {"expert pairs"}),
    ([entry("conv", "conv2d")], {"convolution pairs"}),
]


@pytest.mark.parametrize(("entries", "features"), PLANS)
def test_features_of_a_plan(entries: list[PlanEntry], features: set[str]) -> None:
    assert features_of_plan(Plan(tuple(entries)), tied=True) == features
    assert features_of_plan(Plan(tuple(entries)), tied=False) == features - {"tied head pairs"}


def test_features_of_extras_and_of_ranks_that_are_yet_to_be_chosen() -> None:
    extras = (ExtraEntry("lm_head", "module", (8,)), ExtraEntry("wte", "rows", (1, 8)))
    assert features_of_plan(Plan((), extras), tied=False) == {"whole modules", "new tokens"}
    two = Plan((entry("q_proj", rank=600), entry("k_proj", rank=600)))
    assert features_of_plan(two, tied=False, auto=64) == {"rank above 16", "several ranks", "several scales"}
    assert features_of_plan(two, tied=False, auto=4096) == {"rank above 512", "several ranks", "several scales"}
    assert features_of_plan(two, tied=False, auto=1) == set(), "all have rank 1"
    assert features_of_plan(Plan(two.entries[:1]), tied=False, auto=8) == set(), "one pair has one rank"


def test_features_of_a_finished_adapter() -> None:
    rows = TokenRows((3,), torch.zeros(1, 8))
    one = Adapter({"a.q_proj": pair(), "a.k_proj": pair(8), "lm_head": pair(magnitude=torch.ones(8))}, token_rows={"e": rows})
    expected = {"several ranks", "several scales", "DoRA", "new tokens"}
    assert features_of_adapter(one, tied=False) == expected and has_head(one.pairs)
    assert features_of_adapter(one, tied=True) == {*expected, "tied head pairs"}
    assert features_of_adapter(Adapter({"q_proj": pair(), "k_proj": pair(8, 24.0)}), tied=True) == {"several ranks"}
    biased = Adapter({"q_proj": pair(scale_rule="alpha/sqrt(rank)", bias=torch.ones(8))})
    assert features_of_adapter(biased, tied=True) == {"rsLoRA", "bias in the pairs"}


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


def test_vllms_rules_say_what_a_real_vllm_did() -> None:
    """The newest result of trying vLLM, rule by rule; what is refused there is never said to load here."""
    newest = max(ROOT.glob("benchmarks/results/vllm_rules.*.json"), key=lambda path: json.loads(path.read_text())["began"])
    result = json.loads(newest.read_text())
    assert json.loads(result["vllm"])["version"] == VLLM_TRIED
    rules = {limit.feature: limit for limit in LIMITS if limit.runtime == "vllm"}
    tried = {feature: found["does"] for feature, found in result["attempts"].items()}
    assert len(tried) >= 13 and {feature: limit.seen for feature, limit in rules.items() if limit.seen} == {
        feature: does for feature, does in tried.items() if feature in rules
    }
    assert all(limit.effect == "refused" for limit in rules.values() if limit.seen == "refused")
    assert tried["rank above --max-lora-rank"] == "refused" and {"plain pairs", "rsLoRA"} <= set(tried)
    others = tried.keys() - rules.keys() - {"rank above --max-lora-rank"}
    assert {tried[feature] for feature in others} == {"right"}
    assert "vllm 0.32.0, tried: refused" in rules["DoRA"].evidence
    assert rules["expert pairs"].evidence == rules["expert pairs"].source

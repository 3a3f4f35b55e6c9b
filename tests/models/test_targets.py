"""From settings to a plan: what each way of naming a target means, and every problem in words, all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, LlamaForSequenceClassification

from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError
from tiny.models import FAMILIES, tiny_model

Planned = Callable[..., Plan]


def leaves(plan: Plan) -> set[str]:
    return {entry.path.rpartition(".")[2] for entry in plan.entries}


def message(planned: Planned, model: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(model, **settings)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_matrix_but_heads_embeddings_and_routers(planned: Planned, family: str) -> None:
    plan = planned(tiny_model(family))
    assert not leaves(plan) & {"lm_head", "embed_tokens", "wte", "wpe", "gate", "shared_expert_gate", "score"}
    attention, mlp = (planned(tiny_model(family), target_modules=(word,)) for word in ("attention", "mlp"))
    assert set(plan.entries) == set(attention.entries) | set(mlp.entries)
    assert not set(attention.entries) & set(mlp.entries)
    assert len(attention.entries) >= 4
    assert len(mlp.entries) >= 4
    assert plan.frozen_parameters == sum(p.numel() for p in tiny_model(family).parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_parameters(planned: Planned, family: str) -> None:
    entries = planned(tiny_model(family), target_modules=("experts",)).entries
    assert [entry.kind for entry in entries] == ["experts"] * 4
    assert entries[0].path == "model.layers.0.mlp.experts.gate_up_proj"
    assert entries[0].shape_a == (4, 4, 32)
    by_name = planned(tiny_model(family), target_modules=("gate_up_proj",)).entries
    assert by_name == entries[::2]


def test_a_model_of_no_known_family(planned: Planned) -> None:
    config = GPTNeoXConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert leaves(planned(model)) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert leaves(planned(model, target_modules=("attention",))) == {"query_key_value", "dense"}
    assert leaves(planned(model, target_modules=("mlp",), layers="1")) == {"dense_h_to_4h", "dense_4h_to_h"}


def test_a_classification_head_is_an_extra_not_a_target(planned: Planned) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=3
    )
    plan = planned(LlamaForSequenceClassification(config), extra_modules=("score",))
    assert "score" not in leaves(plan)
    assert [(extra.path, extra.kind, extra.parameters) for extra in plan.extras] == [("score", "module", 96)]


def test_names_endings_exclusion_and_layers(planned: Planned) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    assert len(planned(model, target_modules=("self_attn.q_proj", "model.layers.3.mlp.up_proj")).entries) == 5
    assert leaves(planned(model, exclude_modules=("mlp", "k_proj", r".*\.[vo]_proj"))) == {"q_proj"}
    numbers = {entry.path.split(".")[2] for entry in planned(model, layers="0,2-3").entries}
    assert numbers == {"0", "2", "3"}
    assert {entry.path.split(".")[2] for entry in planned(model, layers="top:1").entries} == {"3"}
    assert "lm_head" in leaves(planned(model, target_modules=("q_proj", "lm_head"), layers="1"))


def test_a_regular_expression_excludes_whole_paths_only(planned: Planned) -> None:
    text = message(planned, tiny_model("llama"), exclude_modules=(r".*self_attn\.[qk]",))
    assert "matches no module of the model" in text
    unlike = message(planned, tiny_model("llama"), exclude_modules=("zz",))
    assert "'zz' matches no module of the model. It has model, embed_tokens, layers, self_attn, q_proj" in unlike
    assert "or leave it out." in unlike


def test_patterns_set_rank_and_alpha(planned: Planned) -> None:
    plan = planned(
        tiny_model("mixtral"), rank_pattern={r"layers\.1\..*q_proj": 2, "experts.down_proj": 3}, alpha_pattern={"q_proj": 5.0}
    )
    by_path = {entry.path: entry for entry in plan.entries}
    assert by_path["model.layers.1.self_attn.q_proj"].rank == 2
    assert by_path["model.layers.0.self_attn.q_proj"].rank == 4
    assert by_path["model.layers.0.self_attn.q_proj"].alpha == 5
    assert by_path["model.layers.0.mlp.experts.down_proj"].rank == 3


def test_an_embedding_has_no_dropout(planned: Planned) -> None:
    plan = planned(tiny_model("llama"), target_modules=("embed_tokens", "q_proj"), dropout=0.1)
    assert [entry.dropout for entry in plan.entries] == [0.0, 0.1, 0.1]
    assert plan.entries[0].shape == (96, 32)


def test_a_misspelt_target_names_its_neighbour(planned: Planned) -> None:
    text = message(planned, tiny_model("llama"), target_modules=("q_prj",))
    assert "No module matches target 'q_prj' (the model has" in text
    assert "k_proj" in text
    assert text.endswith("Did you mean 'q_proj'?")
    assert "Did you mean 'all-linear'?" in message(planned, tiny_model("llama"), target_modules=("all_linear",))


def test_every_problem_at_once(planned: Planned) -> None:
    text = message(
        planned,
        tiny_model("llama"),
        rank=64,
        target_modules=("q_prj", "v_proj", "input_layernorm", "self_attn"),
        layers="0-7",
        rank_pattern={"v_prj": 2},
        exclude_modules=("kproj", "("),
        extra_modules=("nrm",),
    )
    assert "(9 problems)" in text
    for words in (
        "'q_prj'",
        "'kproj' matches no module of the model. Did you mean 'k_proj'?",
        "'(' is no module of the model and not a regular expression",
        "2 blocks are 0 to 1; 2 is none",
        "'model.layers.[0-1].self_attn' cannot be adapted: it is a LlamaAttention, which contains q_proj",
        "'model.layers.[0-1].input_layernorm' cannot be adapted: it is a LlamaRMSNorm",
        "lora.rank_pattern 'v_prj' matches none",
        "Rank 64 is larger than model.layers.[0-1].self_attn.v_proj (16×32) allows: at most 16",
        "extra_modules 'nrm'. Did you mean 'norm'?",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"variant": "dora", "target_modules": ("embed_tokens",)}, "dora cannot be put on embedding weights"),
        ("mixtral", {"variant": "dora"}, "dora cannot be put on experts weights such as 'model.layers.0.mlp.experts"),
        ("mixtral", {"start": "pissa"}, "pissa is for linear layers, not for experts weights"),
        ("llama", {"start": "olora", "target_modules": ("embed_tokens",)}, "olora is for linear layers"),
        ("llama", {"start": "orthogonal", "rank_pattern": {"q_proj": 3}}, "even rank, but model.layers.[0-1].self_attn.q_proj"),
        ("llama", {"layers": "top:3"}, "the model has 2 blocks; take top:2 at most"),
        ("llama", {"exclude_modules": (".*",)}, "Nothing would be trained"),
        ("llama", {"target_modules": ("experts",)}, "No module matches target 'experts'"),
        ("llama", {"rank": 0}, "lora.rank is 0"),
        ("llama", {"extra_modules": ("mlp",)}, "'model.layers.0.mlp' would be trained as an extra, and 'model.layers.0.mlp.gate"),
    ],
)
def test_single_problems(planned: Planned, family: str, settings: dict[str, Any], words: str) -> None:
    assert words in message(planned, tiny_model(family), **settings)


def test_unfit_kinds_are_named(planned: Planned) -> None:
    net = nn.Sequential()
    net.add_module("grouped", nn.Conv2d(4, 4, 3, groups=2))
    net.add_module("reflected", nn.Conv2d(4, 4, 3, padding_mode="reflect"))
    net.add_module("normed", nn.Embedding(8, 4, max_norm=1.0))
    net.add_module("attention", nn.MultiheadAttention(4, 2))
    text = message(planned, net, rank=2, target_modules=("grouped", "reflected", "normed", "out_proj"))
    for words in ("groups=2", "padding_mode='reflect'", "max_norm", "NonDynamicallyQuantizableLinear"):
        assert words in text


def test_experts_with_another_layout_are_refused_not_left_out(planned: Planned) -> None:
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
    text = message(planned, model)
    assert "'model.layers.[0-1].mlp.experts.gate_up_proj' cannot be adapted" in text
    assert "its experts end in a norm" in text
    assert leaves(planned(model, exclude_modules=("experts",))) == {"q_proj", "k_proj", "v_proj", "o_proj"}

def test_a_tied_head_shares_the_new_rows_and_an_own_head_gets_its_own(planned: Callable[..., Plan]) -> None:
    tied = planned(tiny_model("qwen2"), new_tokens=("<a>", "<b>")).extras
    assert [(e.path, e.tied, e.shape, e.tokens) for e in tied] == [("model.embed_tokens", "lm_head", (2, 32), ("<a>", "<b>"))]
    own = planned(tiny_model("llama"), new_tokens=("<a>", "<b>")).extras
    assert [(e.path, e.tied) for e in own] == [("model.embed_tokens", ""), ("lm_head", "")]


def test_only_extras_is_enough(planned: Callable[..., Plan]) -> None:
    plan = planned(tiny_model("llama"), target_modules=(), extra_modules=("model.norm",))
    assert not plan.entries
    assert plan.parameters == 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"new_tokens": ("<a>", "<a>")}, "'<a>' is empty or named twice"),
        ({"new_tokens": ("",)}, "'' is empty or named twice"),
        ({"new_tokens": ("<a>",), "target_modules": ("embed_tokens",)}, "'model.embed_tokens' gets a pair as well"),
        ({"new_tokens": ("<a>",), "extra_modules": ("lm_head",)}, "leave it out of extra_modules"),
        ({"extra_modules": ("rotary_emb",)}, "without parameters"),
        ({"extra_modules": ("self_attn", "q_proj"), "target_modules": ("mlp",)}, "within it are both extras"),
    ],
)
def test_problems(planned: Callable[..., Plan], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tiny_model("llama"), **settings)
    assert words in str(caught.value)


def test_new_tokens_need_a_token_embedding(planned: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match="needs a token embedding, which Sequential does not have"):
        planned(nn.Sequential(nn.Linear(8, 8)), new_tokens=("<a>",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra_modules": ("lm_head",)}, "leave it out of extra_modules"),
        ({"target_modules": ("lm_head",)}, "'lm_head' would be trained as an extra, and 'lm_head' gets a pair as well"),
    ],
)
def test_a_tied_head_that_gets_new_rows_takes_nothing_else(
    planned: Callable[..., Plan], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(tiny_model("qwen2"), new_tokens=("<a>",), **settings)

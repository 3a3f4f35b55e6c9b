"""Laws of injection, for every family with the real transformers classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.errors import ConfigError
from lorakeet.models.inject import (
    activate,
    adapter_names,
    adapter_of,
    attach,
    drop_empty,
    eject,
    inject,
    keep_terms,
    trained_parameters,
)
from tiny.dense import fold_into
from tiny.models import FAMILIES, tiny_model

IDS = torch.arange(5, 22)[None] * 5 % 96


class Net(nn.Module):
    """A small convolution net, to show that injection asks nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, dilation=2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.score = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.grouped(self.second(torch.relu(self.first(x))))
        return self.score(y.mean((2, 3)))


def state(model: Any) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    return {path: id(module) for path, module in model.named_modules()}, {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(model: Any, before: tuple[dict[str, int], dict[str, torch.Tensor]]) -> None:
    modules, tensors = state(model)
    assert modules == before[0]
    assert list(tensors) == list(before[1])
    assert all(torch.equal(tensors[key].view(torch.uint8), before[1][key].view(torch.uint8)) for key in tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_a_start_with_B_zero_changes_nothing(planned: Callable[..., Plan], family: str, start: str) -> None:
    model = tiny_model(family)
    before = model(IDS).logits
    inject(model, planned(model, start=start))
    assert (model(IDS).logits - before).abs().max() <= 4e-6


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_other_starts_change_nothing_beyond_rounding_and_train_both_factors(
    planned: Callable[..., Plan], family: str, start: str
) -> None:
    model = tiny_model(family)
    before = model(IDS).logits
    inject(model, planned(model, start=start))
    assert (model(IDS).logits - before).abs().max() < 3e-5
    assert all(parameter.abs().max() > 0 for parameter in trained_parameters(model).values())


def test_orthogonal_start_on_experts(planned: Callable[..., Plan]) -> None:
    model = tiny_model("mixtral")
    before = model(IDS).logits
    inject(model, planned(model, start="orthogonal", target_modules=("experts",)))
    assert (model(IDS).logits - before).abs().max() < 3e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_eject_restores_modules_and_bits(adapted: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    before, answer = state(model), model(IDS).logits
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    adapted(model, target_modules=("all-linear", embedding), extra_modules=("lm_head",))
    assert not torch.allclose(model(IDS).logits, answer, atol=1e-2)
    eject(model)
    assert_same_state(model, before)
    assert torch.equal(model(IDS).logits, answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_dense_fold(adapted: Callable[..., Any], family: str) -> None:
    """In fp64: the hand-written backward against autograd through W + s·B·A as one dense weight."""
    plain = tiny_model(family).double()
    if "moe" in family or family == "mixtral":
        plain.set_experts_implementation("eager")  # the grouped product has no fp64
    model = adapted(tiny_model(family)).double()
    model(IDS).logits.square().mean().backward()
    trained = trained_parameters(model)
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained.items()}
    weights = {}
    for path in [name.removesuffix(".A") for name in trained if name.endswith(".A")]:
        product = 3 * leaves[f"{path}.B"] @ leaves[f"{path}.A"]
        name = path if product.dim() == 3 else f"{path}.weight"
        weight = plain.get_parameter(name)
        weights[name] = weight + (product if weight.shape == product.shape and "c_" not in path else product.t())
    dense = functional_call(plain, weights, (IDS,)).logits
    assert torch.allclose(model(IDS).logits, dense, atol=1e-8)
    dense.square().mean().backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, leaves[name].grad, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_taken_and_attached_again_is_the_same_function(adapted: Callable[..., Any], family: str) -> None:
    model = adapted(tiny_model(family), extra_modules=("norm" if family != "gpt2" else "ln_f",))
    answer = model(IDS).logits
    value = adapter_of(model, base="somewhere")
    other = tiny_model(family)
    attach(other, value, "again")
    assert torch.equal(other(IDS).logits, answer)
    again = adapter_of(other, "again", base="somewhere")
    assert again.base == "somewhere"
    assert list(again.pairs) == list(value.pairs)
    assert all(torch.equal(again.pairs[path].A, pair.A) and again.pairs[path].alpha == 12 for path, pair in value.pairs.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_its_fold_into_dense_weights(adapted: Callable[..., Any], family: str) -> None:
    model = adapted(tiny_model(family))
    dense = fold_into(tiny_model(family), adapter_of(model))
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=5e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_anchored_adapter_survives_as_twice_the_rank(adapted: Callable[..., Any], start: str) -> None:
    model = adapted(tiny_model("llama"), start=start)
    value = adapter_of(model)
    assert {pair.rank for pair in value.pairs.values()} == {8}
    other = tiny_model("llama")
    attach(other, value)
    assert torch.allclose(other(IDS).logits, model(IDS).logits, atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_keeps_its_function_through_value_and_fold(
    adapted: Callable[..., Any], planned: Callable[..., Plan], family: str
) -> None:
    model = tiny_model(family)
    before = model(IDS).logits
    inject(model, planned(model, variant="dora"))
    assert torch.allclose(model(IDS).logits, before, atol=2e-5)
    eject(model)
    adapted(model, variant="dora")
    answer, value = model(IDS).logits, adapter_of(model)
    other = tiny_model(family)
    attach(other, value)
    assert torch.allclose(other(IDS).logits, answer, atol=1e-5)
    assert torch.allclose(fold_into(tiny_model(family), value)(IDS).logits, answer, atol=5e-5)


def test_rslora_scale_counts(adapted: Callable[..., Any]) -> None:
    model = adapted(tiny_model("llama"), scale_rule="alpha/sqrt(rank)")
    dense = fold_into(tiny_model("llama"), adapter_of(model))
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_a_pair_on_a_tied_embedding_leaves_the_head_alone(adapted: Callable[..., Any], family: str) -> None:
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    model = adapted(tiny_model(family), target_modules=(embedding,))
    value = adapter_of(model)
    (path,) = value.pairs
    dense = fold_into(tiny_model(family), value)  # unties, as the head keeps the old rows
    assert torch.equal(model.get_output_embeddings().weight, tiny_model(family).get_output_embeddings().weight)
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=5e-5)
    assert value.pairs[path].A.shape == (4, 96)


def test_a_pair_on_a_tied_head_leaves_the_embedding_alone(adapted: Callable[..., Any]) -> None:
    model = adapted(tiny_model("qwen2"), target_modules=("lm_head",))
    dense = fold_into(tiny_model("qwen2"), adapter_of(model))
    assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=5e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_convolutions(adapted: Callable[..., Any], variant: str) -> None:
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    model = Net().eval()
    before, answer = state(model), model(images)
    adapted(model, target_modules=("first", "second", "score"), variant=variant)
    value = adapter_of(model)
    assert {pair.kind for pair in value.pairs.values()} == {"conv2d", "linear"}
    assert torch.allclose(model(images), fold_into(Net().eval(), value)(images), atol=1e-5)
    assert not torch.allclose(model(images), answer, atol=1e-3)
    eject(model)
    assert_same_state(model, before)


def test_everything_but_the_adapter_is_frozen_and_names_are_in_model_order(planned: Callable[..., Plan]) -> None:
    model = tiny_model("mixtral").requires_grad_(True)
    inject(model, planned(model, rank_pattern={"q_proj": 2}))
    trained = trained_parameters(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert list(trained)[:3] == [f"model.layers.0.self_attn.{name}" for name in ("q_proj.A", "q_proj.B", "k_proj.A")]
    assert "model.layers.1.mlp.experts.gate_up_proj.B" in trained
    assert trained["model.layers.0.self_attn.q_proj.A"].shape == (2, 32)


def test_the_seed_decides_the_start(planned: Callable[..., Plan]) -> None:
    values = []
    for seed in (1, 1, 2):
        model = tiny_model("llama")
        inject(model, planned(model), seed=seed)
        values.append(adapter_of(model).pairs["model.layers.0.mlp.up_proj"].A)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_several_adapters_by_name(adapted: Callable[..., Any]) -> None:
    model = tiny_model("mixtral")
    before, base = state(model), model(IDS).logits
    adapted(model, "one", seed=1)
    one = model(IDS).logits
    adapted(model, "two", seed=2, target_modules=("attention",))
    two = model(IDS).logits
    assert adapter_names(model) == ["one", "two"]
    for name, expected in (("one", one), (None, base), ("two", two)):
        activate(model, name)
        assert torch.equal(model(IDS).logits, expected)
    eject(model, "two")
    activate(model, "one")
    assert torch.equal(model(IDS).logits, one)
    eject(model, "one")
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("name", "words"), [("a.b", "letters"), ("items", "letters"), ("", "letters"), ("default", "already on the model")]
)
def test_unusable_names(planned: Callable[..., Plan], name: str, words: str) -> None:
    model = tiny_model("llama")
    inject(model, planned(model))
    with pytest.raises(ConfigError, match=words):
        inject(model, planned(model), name)


@pytest.mark.parametrize("act", [activate, eject, adapter_of, trained_parameters])
def test_an_unknown_adapter_is_named_with_its_neighbour(planned: Callable[..., Plan], act: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    inject(model, planned(model), "reviews")
    with pytest.raises(ConfigError, match=r"No adapter 'review' is on the model \(it has reviews\). Did you mean 'reviews'"):
        act(model, "review")


def test_a_plan_of_another_model_is_refused_before_anything_changes(planned: Callable[..., Plan]) -> None:
    model = tiny_model("llama")
    before = state(model)
    wide = tiny_model("llama", hidden_size=64)
    entries = (*planned(wide).entries[:2], PlanEntry("model.layers.9.q", "linear", (4, 4), 4, 12.0))
    with pytest.raises(ConfigError, match="3 problems") as caught:
        inject(model, Plan(entries))
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "model.layers.9.q" in str(caught.value)
    assert_same_state(model, before)


def test_a_layer_used_in_another_way_is_refused(planned: Callable[..., Plan]) -> None:
    model = tiny_model("llama")
    inject(model, planned(model, extra_modules=("lm_head",)), "one")
    with pytest.raises(ConfigError, match="another adapter uses it as TrainedModule"):
        inject(model, planned(model, target_modules=("lm_head",)), "two")


def test_experts_that_compute_something_else_are_refused(planned: Callable[..., Plan]) -> None:
    model = tiny_model("mixtral")

    class Doubled(type(model.model.layers[0].mlp.experts)):  # type: ignore[misc]
        def forward(self, *arguments: Any) -> torch.Tensor:
            return 2 * super().forward(*arguments)

    model.model.layers[0].mlp.experts.__class__ = Doubled
    with pytest.raises(ConfigError, match=r"layers.0.mlp.experts' cannot be adapted: its Doubled does not compute"):
        inject(model, planned(model, target_modules=("experts",)))


def test_an_empty_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="The adapter is empty"):
        attach(tiny_model("llama"), Adapter({}))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_cut_adapter_is_the_value_that_it_becomes(adapted: Callable[..., Any], family: str) -> None:
    model = adapted(tiny_model(family))
    paths = list(adapter_of(model).pairs)
    before = [name for name, _ in trained_parameters(model).items()]
    for number, path in enumerate(paths):
        keep_terms(model, path, torch.arange(number % 3))
    assert [name for name, _ in trained_parameters(model).items()] == before, "pairs of rank 0 stay in their places"
    logits, value = model(IDS).logits, adapter_of(model)
    assert {path: pair.rank for path, pair in value.pairs.items()} == {p: n % 3 for n, p in enumerate(paths) if n % 3}
    drop_empty(model)
    assert len(trained_parameters(model)) == 2 * len(value.pairs)
    assert (model(IDS).logits - logits).abs().max() <= 4e-6
    fresh = tiny_model(family)
    attach(fresh, value)
    assert (fresh(IDS).logits - logits).abs().max() <= 4e-6
    modules = {path: type(module) for path, module in model.named_modules() if "adapters" not in path}
    assert modules == {path: type(module) for path, module in fresh.named_modules() if "adapters" not in path}
    with pytest.raises(ConfigError, match=r"has no pair at .model\.nothing"):
        keep_terms(model, "model.nothing", torch.arange(1))


OLD = torch.tensor([[5, 9, 11, 4, 30, 31]])
WITH_NEW = torch.tensor([[5, 96, 11, 97, 30, 96]])


@pytest.mark.parametrize("family", FAMILIES)
def test_old_rows_keep_their_bits_and_new_ones_begin_at_the_mean(planned: Callable[..., Plan], family: str) -> None:
    model = tiny_model(family)
    old, answer = model.get_input_embeddings().weight.clone(), model(OLD).logits
    inject(model, planned(model, target_modules=(), new_tokens=("<a>", "<b>")))
    assert model.config.vocab_size == 98
    assert torch.equal(model.get_input_embeddings().weight[:96], old)
    logits = model(OLD).logits
    assert logits.shape[-1] == 98
    assert torch.allclose(logits[..., :96], answer, atol=1e-6)
    for parameter in trained_parameters(model).values():
        assert torch.allclose(parameter[0], parameter[1])
    (first, *_) = trained_parameters(model).values()
    assert torch.allclose(first[0], old.mean(0), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_rows_are_rows_of_the_weights(adapted: Callable[..., Any], family: str) -> None:
    """The model with trained rows against one whose embedding and head hold them as plain weights."""
    model = adapted(tiny_model(family), target_modules=(), new_tokens=("<a>", "<b>"))
    value = adapter_of(model)
    plain = tiny_model(family)
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    tied = head.weight is embedding.weight
    for path, rows in value.token_rows.items():
        assert rows.ids == (96, 97)
        assert rows.tokens == ("<a>", "<b>")
        assert bool(rows.tied) == tied
        module = plain.get_submodule(path)
        grown = torch.nn.Parameter(torch.cat([module.weight, rows.rows]), requires_grad=False)
        for each in (embedding, head) if tied else (module,):
            each.weight = grown
    assert torch.allclose(model(WITH_NEW).logits, plain(WITH_NEW).logits, atol=2e-5)
    assert len(trained_parameters(model)) == len(value.token_rows) == (1 if tied else 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_eject_shrinks_again(adapted: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    before, answer = {k: v.clone() for k, v in model.state_dict().items()}, model(OLD).logits
    adapted(model, new_tokens=("<a>",))
    eject(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(OLD).logits, answer)
    assert model.config.vocab_size == 96
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (family != "llama")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_travel_with_the_adapter(adapted: Callable[..., Any], family: str) -> None:
    model = adapted(tiny_model(family), new_tokens=("<a>", "<b>"))
    other = tiny_model(family)
    attach(other, adapter_of(model))
    assert torch.equal(other(WITH_NEW).logits, model(WITH_NEW).logits)


def test_ids_within_the_vocabulary_need_no_new_rows(planned: Callable[..., Plan]) -> None:
    model = tiny_model("qwen2")
    inject(model, planned(model, target_modules=(), new_tokens=("<a>",)), token_ids=(90,))
    assert model.config.vocab_size == 96
    (rows,) = trained_parameters(model).values()
    with torch.no_grad():
        rows.mul_(5)
    changed = model(torch.tensor([[90, 5]])).logits
    activate(model, None)
    assert not torch.allclose(changed, model(torch.tensor([[90, 5]])).logits, atol=1e-2)

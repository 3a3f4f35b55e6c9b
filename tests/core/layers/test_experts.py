"""Experts with pairs against transformers' own block with folded parameters."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama4 import modeling_llama4
from transformers.models.longcat_flash import modeling_longcat_flash
from transformers.models.nemotron_h import modeling_nemotron_h

from lorakeet.core.layers.experts import ExpertPairs, LoraExperts, first_stack, stack_shape, why_not_experts
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.core.selection import Share
from tiny.models import tiny_model


@pytest.fixture
def block() -> Any:
    return tiny_model("mixtral").model.layers[0].mlp.experts


def routed(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 32, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    return x, index, torch.rand(tokens, 2, generator=generator)


def with_pairs(block: nn.Module, *names: str, dropout: float = 0.0) -> LoraExperts:
    layer, pairs = LoraExperts(block), ExpertPairs()
    torch.manual_seed(2)
    for name in names:
        shape = stack_shape(block, name)
        pairs[name] = LoraPair(PlanEntry(name, "experts", shape, 4, 12.0, dropout=dropout))
        with torch.no_grad():
            pairs[name].A.normal_(0, 0.2)
            pairs[name].B.normal_(0, 0.2)
    layer.attach("a", pairs)
    layer.active = "a"
    return layer.eval()


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",), ()])
def test_pairs_are_folded_parameters(block: Any, names: tuple[str, ...]) -> None:
    layer, folded = with_pairs(block, *names), copy.deepcopy(block)
    for name in names:
        pair = cast(LoraPair, layer.adapters["a"][name])
        getattr(folded, name).data += 3 * torch.einsum("eor,eri->eoi", pair.B, pair.A).detach()
    arguments = routed()
    assert torch.allclose(layer(*arguments), folded(*arguments), atol=1e-5)
    layer.active = None
    assert torch.equal(layer(*arguments), block(*arguments))


def test_experts_that_clamp_their_gate_do_so_with_pairs() -> None:
    """DeepSeek-V4's clamp at 10, beyond the activations of its random weights."""
    config = transformers.DeepseekV4Config(
        hidden_size=32, moe_intermediate_size=24, num_local_experts=4, swiglu_limit=10.0, experts_implementation="eager"
    )
    block = modeling_deepseek_v4.DeepseekV4Experts(config).requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(0))
    x, index, weights = routed()
    layer = with_pairs(block)
    for size in (1, 50):
        torch.testing.assert_close(layer(size * x, index, weights), block(size * x, index, weights))


def test_an_expert_without_tokens_gets_no_gradient(block: Any) -> None:
    layer = with_pairs(block, "gate_up_proj", "down_proj")
    x, index, weights = routed()
    layer(x, index % 3, weights).square().sum().backward()
    for parameter in layer.adapters.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad[3], torch.zeros_like(parameter.grad[3]))
        assert all(parameter.grad[expert].abs().max() > 0 for expert in range(3))


def test_a_dropped_choice_adds_nothing(block: Any) -> None:
    """transformers marks a choice as dropped by an index past the last expert."""
    layer = with_pairs(block, "down_proj")
    x, index, weights = routed()
    dropped = index.clone()
    dropped[0, 1] = 4
    none = weights.clone()
    none[0, 1] = 0
    assert torch.allclose(layer(x, dropped, weights), layer(x, index, none), atol=1e-6)


def test_dropout_only_while_training(block: Any) -> None:
    layer, arguments = with_pairs(block, "gate_up_proj", dropout=0.5), routed()
    assert torch.equal(layer(*arguments), layer(*arguments))
    layer.train()
    assert not torch.equal(layer(*arguments), layer(*arguments))


def gpt_oss_block() -> Any:
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=24, num_local_experts=4, swiglu_limit=2.0, experts_implementation="eager"
    )
    return modeling_gpt_oss.GptOssExperts(config)


def nemotron_block() -> Any:
    config = transformers.NemotronHConfig(
        hidden_size=32, moe_intermediate_size=24, n_routed_experts=4, moe_latent_size=None, experts_implementation="eager"
    )
    return modeling_nemotron_h.NemotronHExperts(config)


@pytest.mark.parametrize(("make", "across"), [(gpt_oss_block, True), (nemotron_block, False)])
def test_transposed_biased_interleaved_and_gateless_experts_are_folded_parameters(make: Any, across: bool) -> None:
    block = make().requires_grad_(False)
    for number, parameter in enumerate(block.parameters()):
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(number))
    assert why_not_experts(block) == ""
    names = (first_stack(block), "down_proj")
    layer, folded = with_pairs(block, *names), copy.deepcopy(block)
    for name in names:
        pair = cast(LoraPair, layer.adapters["a"][name])
        change = 3 * torch.einsum("eor,eri->eoi", pair.B, pair.A).detach()
        getattr(folded, name).data += change.transpose(1, 2) if across else change
    x, index, weights = routed()
    for size in (1, 20):  # beyond the clamp of gpt-oss
        torch.testing.assert_close(layer(size * x, index, weights), folded(size * x, index, weights), rtol=1e-4, atol=1e-4)


def llama4_moe(choices: int = 2) -> Any:
    config = transformers.Llama4TextConfig(
        hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=choices, num_hidden_layers=1
    )
    block = modeling_llama4.Llama4TextMoe(config).requires_grad_(False)
    for number, parameter in enumerate(block.parameters()):
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(number))
    return block


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("known", [True, False])
def test_pairs_on_llama_4_are_what_peft_adds_to_its_parameters(choices: int, known: bool) -> None:
    """The parameters are (experts, in, out), which PEFT takes for (experts, out, in); the router's gradient passes too."""
    moe, x = llama4_moe(choices), 2 * routed()[0][None]
    folded = copy.deepcopy(moe)
    assert why_not_experts(moe.experts) == ""
    layer = with_pairs(moe.experts, "gate_up_proj", "down_proj")
    layer.choices = choices if known else None
    pairs = cast(ExpertPairs, layer.adapters["a"])
    leaves = [factor for name in pairs for factor in (pairs[name].A, pairs[name].B)]
    changes = {name: 3 * torch.einsum("eor,eri->eoi", pairs[name].B, pairs[name].A) for name in pairs}
    assert changes["gate_up_proj"].shape == folded.experts.gate_up_proj.shape
    moe.experts = layer
    entry = x.clone().requires_grad_()
    ours, _ = moe(entry)
    theirs = torch.func.functional_call(
        folded, {f"experts.{name}": getattr(folded.experts, name) + change for name, change in changes.items()}, (entry,)
    )[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    for mine, other in zip(*(torch.autograd.grad(y, [entry, *leaves], upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    layer.active = None
    assert torch.equal(moe(x)[0], folded(x)[0])


def test_tokens_of_llama_4_with_different_adapters() -> None:
    """Each share of a batch is what its adapter computes alone."""
    moe, x = llama4_moe(1), routed()[0][None]
    layer = with_pairs(moe.experts, "gate_up_proj", "down_proj")
    other = ExpertPairs({name: copy.deepcopy(pair) for name, pair in layer.adapters["a"].items()})
    for pair in other.values():
        nn.init.normal_(cast(LoraPair, pair).A, 0, 0.2)
    layer.attach("b", other)
    moe.experts = layer
    alone = {}
    for name in ("a", "b", None):
        layer.active = name
        alone[name] = moe(x)[0].detach().view(7, -1)
    layer.selection.divide([Share(0, 3, "a"), Share(5, 7, "b")], units=7)
    mixed = moe(x)[0].detach().view(7, -1)
    torch.testing.assert_close(mixed, torch.cat([alone["a"][:3], alone[None][3:5], alone["b"][5:]]), rtol=1e-4, atol=1e-5)


def test_tokens_of_experts_without_weights_pass_through() -> None:
    """LongCat-Flash's last experts: until 5.24 transformers' block of experts has them, from 5.25 on the block around it."""
    config = transformers.LongcatFlashConfig(
        hidden_size=32, expert_ffn_hidden_size=24, n_routed_experts=4, zero_expert_num=3, moe_topk=3, num_layers=1
    )
    moe = modeling_longcat_flash.LongcatFlashMoE(config).requires_grad_(False)
    for number, parameter in enumerate(moe.parameters()):
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(number))
    block = moe.experts
    assert why_not_experts(block) == "" and len(block.down_proj) == 4
    layer, folded = with_pairs(block, "gate_up_proj", "down_proj"), copy.deepcopy(moe)
    for name in ("gate_up_proj", "down_proj"):
        pair = cast(LoraPair, layer.adapters["a"][name])
        getattr(folded.experts, name).data += 3 * torch.einsum("eor,eri->eoi", pair.B, pair.A).detach()
    moe.experts = layer
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(9))
    chosen = moe.router(x[0])[-1]
    assert set(chosen.unique().tolist()) == set(range(7)) and bool((chosen >= 4).sum(1).max() == 2)
    torch.testing.assert_close(moe(x), folded(x), rtol=1e-4, atol=1e-4)
    assert layer.train().tokens.total() == 0
    moe(x)
    assert layer.tokens.total() >= int((chosen < 4).sum())


def test_what_cannot_be_adapted_is_said(block: Any) -> None:
    assert why_not_experts(block) == ""
    block.has_post_expert_norm = True
    assert "norm" in why_not_experts(block)
    block = copy.copy(block)
    block.has_post_expert_norm = False
    block.gate_up_proj = nn.Parameter(torch.cat([block.gate_up_proj, block.gate_up_proj]), requires_grad=False)
    assert "no down_proj" in why_not_experts(block)

    class Alone(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    other = tiny_model("mixtral").model.layers[0].mlp.experts
    other.__class__ = Alone
    assert "not called with the experts" in why_not_experts(other)


def test_other_modules_are_no_experts(block: Any) -> None:
    assert "no gate_up_proj and down_proj" in why_not_experts(nn.Linear(2, 2))

    class Unknown(nn.ParameterDict):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return hidden_states

    assert "no act_fn" in why_not_experts(Unknown({"gate_up_proj": torch.ones(2, 2, 2), "down_proj": torch.ones(2, 2, 2)}))


def more_pairs(layer: LoraExperts, name: str, *leaves: str, seed: int, rank: int = 2, dropout: float = 0.0) -> None:
    """Another adapter on the layer, with pairs on some of its parameters."""
    pairs, generator = ExpertPairs(), torch.Generator().manual_seed(seed)
    for leaf in leaves:
        entry = PlanEntry(leaf, "experts", stack_shape(layer.original, leaf), rank, 3.0 * rank, dropout=dropout)
        pairs[leaf] = LoraPair(entry)
        for factor in (pairs[leaf].A, pairs[leaf].B):
            nn.init.normal_(factor, 0, 0.2, generator=generator)
    layer.attach(name, pairs)
    layer.eval()


SHARES = (Share(0, 3, "a"), Share(4, 6, "b"), Share(6, 9, "a", 0.25), Share(6, 9, "b", -0.5))  # tokens 3, 9 and 10: the base


def mixed_layer(make: Any = None) -> LoraExperts:
    """A block with two adapters, the second on one parameter alone."""
    block = (make or (lambda: tiny_model("mixtral").model.layers[0].mlp.experts))().requires_grad_(False)
    for number, parameter in enumerate(block.parameters()):
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(number))
    layer = with_pairs(block, first_stack(block), "down_proj")
    more_pairs(layer, "b", "down_proj", seed=5)
    return layer


def one_by_one(layer: LoraExperts, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What each token of SHARES gets by itself, mixes from a block with both changes folded into it."""
    x, index, weights = given
    found = layer.original(x, index, weights).clone()
    for share in SHARES[:2]:
        layer.active = share.name
        own = slice(share.start, share.stop)
        found[own] = layer(x[own], index[own], weights[own])
    mixed = copy.deepcopy(layer.original)
    for share in SHARES[2:]:
        for leaf, pair in layer.adapters[share.name].items():
            change = share.weight * cast(LoraPair, pair).delta()
            across = getattr(mixed, "is_transposed", False)
            getattr(mixed, leaf).data += change.transpose(1, 2) if across else change
    found[6:9] = mixed(x[6:9], index[6:9], weights[6:9])
    return found


@pytest.mark.parametrize("make", [None, gpt_oss_block, nemotron_block])
def test_each_token_of_a_divided_batch_has_its_own_adapters(make: Any) -> None:
    layer, given = mixed_layer(make), routed(11)
    with torch.no_grad():
        wanted = one_by_one(layer, given)
        layer.selection.divide(SHARES, units=11)
        found = layer(*given)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - layer.original(*given)).abs().amax(1)[[0, 1, 2, 4, 5, 6, 7, 8]].min() > 1e-3
        layer.selection.divide([Share(0, 11, "elsewhere")], units=11)
        assert torch.equal(layer(*given), layer.original(*given)), "an adapter without pairs here leaves the block as it is"


def test_gradients_of_a_divided_batch_are_those_of_its_parts() -> None:
    layer, given = mixed_layer(), routed(11)
    upstream = torch.randn(11, 32, generator=torch.Generator().manual_seed(7))
    parameters = dict(layer.adapters.named_parameters())
    layer.selection.divide(SHARES[:2], units=11)
    (layer(*given) * upstream).sum().backward()
    together = {name: cast(Tensor, parameter.grad).clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    for share in SHARES[:2]:
        layer.active = share.name
        own = slice(share.start, share.stop)
        (layer(*(each[own] for each in given)) * upstream[own]).sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-5, atol=1e-5)


def test_pairs_that_drop_numbers_are_not_divided(block: Any) -> None:
    layer = with_pairs(block, "down_proj", dropout=0.5).train()
    layer.selection.divide([Share(0, 3, "a")], units=7)
    with pytest.raises(ValueError, match="dropout of pairs on experts cannot differ within a batch"):
        layer(*routed())


def test_experts_that_hand_tokens_on_as_they_are_are_refused(block: Any) -> None:
    block.down_proj = nn.Parameter(block.down_proj[:-1].detach())
    assert "some of its experts have no down_proj" in why_not_experts(block)


def test_tokens_of_training_are_counted_by_expert(block: Any) -> None:
    layer = with_pairs(block, "gate_up_proj")
    arguments = routed()
    chosen = torch.bincount(arguments[1].flatten(), minlength=4).tolist()
    layer(*arguments)
    with torch.no_grad():
        layer.train()(*arguments)
    assert not layer.tokens and layer.count == 4  # neither in evaluation nor without gradients
    layer(*arguments)
    layer(*arguments)
    assert [layer.tokens[expert] for expert in range(4)] == [2 * count for count in chosen] and sum(chosen) == 14

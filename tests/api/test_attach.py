"""Pairs on any module: trained by any loop, equal to PEFT's layers, removed without a trace."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import lorakeet as lk
from lorakeet.api import attach as attaching
from lorakeet.errors import ConfigError
from tiny.models import tiny_model


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def steps(net: nn.Module, parameters: list[nn.Parameter], x: torch.Tensor, count: int = 5) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, 1e-2), []
    for _ in range(count):
        loss = (net(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_plain_loop_trains_the_pairs_alone() -> None:
    net, x = small_net(), torch.randn(6, 8)
    frozen, before = {name: tensor.clone() for name, tensor in net.state_dict().items()}, net(x).detach()
    plan = lk.attach(net, lk.Lora(rank=2, target_modules=("0", "2")))
    assert plan.parameters == sum(parameter.numel() for parameter in lk.parameters(net)) == 2 * (8 + 16) + 2 * (16 + 4)
    assert torch.equal(net(x), before)
    losses = steps(net, lk.parameters(net), x)
    assert losses[-1] < losses[0]
    adapter = lk.adapter_of(net)
    assert list(adapter) == ["0", "2"] and adapter["0"].B.abs().max() > 0
    after = net(x).detach()
    lk.detach(net)
    assert torch.equal(net(x), before) and all(parameter.requires_grad for parameter in net.parameters())
    assert list(net.state_dict()) == list(frozen) and all(torch.equal(net.state_dict()[name], frozen[name]) for name in frozen)
    lk.attach(net, adapter)
    torch.testing.assert_close(net(x), after, rtol=0, atol=1e-6)


def graph_of(net: nn.Module, x: torch.Tensor) -> set[str]:
    """The names of the operations that the backward pass of net(x) runs."""
    found: set[str] = set()
    waiting = [net(x).sum().grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None:
            found.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    return found


def test_pairs_on_dense_weights_of_their_dtype_have_torchs_own_gradients() -> None:
    """No Python in the backward pass, which is faster for few tokens; as exact as the function that all other bases have."""
    net, x = small_net(), torch.randn(6, 8, requires_grad=True)
    lk.attach(net, lk.Lora(rank=2, alpha=6, target_modules=("0", "2")))
    assert "LowRankLinearBackward" not in graph_of(net, x)
    torch.nn.init.normal_(net[2].adapters["default"].B)
    found = []
    for by_torch in (True, False):
        net[0].by_torch = net[2].by_torch = by_torch
        loss = net(x).square().mean()
        found.append([loss, *torch.autograd.grad(loss, [x, *lk.parameters(net)])])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    net[0].by_torch = net[2].by_torch = True
    (first,) = torch.autograd.grad(net(x).square().mean(), [x], create_graph=True)
    assert all(grad is not None for grad in torch.autograd.grad(first.square().sum(), lk.parameters(net)))
    assert "LowRankLinearBackward" in graph_of(net, torch.randn(129, 8, requires_grad=True)), "more tokens have less to gain"
    half = small_net().bfloat16()
    lk.attach(half, lk.Lora(rank=2, target_modules=("0", "2")))
    assert "LowRankLinearBackward" in graph_of(half, x.bfloat16()), "A and B are in fp32"


def test_thawed_weights_have_no_gradient_whatever_the_number_of_tokens() -> None:
    net = small_net()
    lk.attach(net, lk.Lora(rank=2, target_modules=("0",)))
    net[0].original.bias.requires_grad_(True)
    for tokens in (5, 200):
        net(torch.randn(tokens, 8)).sum().backward()
        assert net[0].original.bias.grad is None and net[0].adapters["default"].A.grad is not None


@pytest.mark.parametrize("tokens", [5, 200])
def test_a_trainers_autocast_changes_nothing_of_a_layer(tokens: int) -> None:
    net, x = nn.Sequential(nn.Linear(8, 16)), torch.randn(tokens, 8)
    lk.attach(net, lk.Lora(rank=2, target_modules=("0",)))
    torch.nn.init.normal_(net[0].adapters["default"].B)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert net[0].adapters["default"].A.grad is not None


def test_dropout_and_the_bare_base_are_kept() -> None:
    net, x = small_net(), torch.ones(6, 8)
    before = net(x)
    lk.attach(net, lk.Lora(rank=2, dropout=0.5, target_modules=("0",)))
    torch.nn.init.normal_(net[0].adapters["default"].B)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))
    lk.activate(net, None)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("name", ["continue_from", "on_top_of"])
def test_an_earlier_adapter_is_refused_rather_than_ignored(name: str) -> None:
    net = small_net()
    with pytest.raises(ConfigError, match="names the earlier adapter runs/sft"):
        lk.attach(net, lk.Lora(rank=2, target_modules=("0",), **{name: "runs/sft"}))
    assert isinstance(net[0], nn.Linear)


def test_flags_of_gradients_come_back() -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    lk.attach(net, lk.Lora(rank=2, target_modules=("2",)))
    lk.attach(net, lk.Lora(rank=2, target_modules=("2",)), name="second")
    lk.detach(net, "second")
    assert not net[0].bias.requires_grad
    lk.detach(net)
    assert not net[0].weight.requires_grad and net[0].bias.requires_grad and net[2].weight.requires_grad
    del net
    gc.collect()
    assert not len(attaching._FLAGS), "a module that is gone leaves nothing"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT"s use of transformers
def test_losses_equal_those_of_pefts_layers() -> None:
    """The same pairs, data and optimizer in fp32: losses of five steps within 1e-6."""
    from peft import LoraConfig, get_peft_model

    base, ids = tiny_model("llama"), torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    lk.attach(ours, lk.Lora(rank=4, alpha=8, target_modules=tuple(targets)))
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    start = lk.adapter_of(ours)
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if hasattr(module, "lora_A") and module.lora_A:
                module.lora_A["default"].weight.copy_(start[name.removeprefix("base_model.model.")].A)
    trained = [
        (ours, lk.parameters(ours)),
        (theirs, [parameter for parameter in theirs.parameters() if parameter.requires_grad]),
    ]
    found = []
    for net, parameters in trained:
        optimizer, losses = torch.optim.SGD(parameters, 0.5), []
        for _ in range(5):
            loss = net(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0][-1] < found[0][0]


def test_within_the_trainer_of_transformers(tmp_path: object) -> None:
    from transformers import Trainer, TrainingArguments

    net = tiny_model("llama")
    lk.attach(net, lk.Lora(rank=4, target_modules=("q_proj", "v_proj")))
    frozen = net.model.layers[0].self_attn.k_proj.weight.clone()
    rows = [{"input_ids": [1, 5, 7, 9], "labels": [1, 5, 7, 9]}] * 8
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(net, arguments, train_dataset=rows).train()
    adapter = lk.adapter_of(net)
    assert all(adapter[path].B.abs().max() > 0 for path in adapter)
    assert torch.equal(net.model.layers[0].self_attn.k_proj.weight, frozen)


def test_of_several_adapters_one_is_active() -> None:
    net, x = small_net(), torch.randn(6, 8)
    before = net(x).detach()
    outputs = {}
    for number, name in enumerate(("one", "two")):
        lk.attach(net, lk.Lora(rank=2, target_modules=("0", "2")), name=name, seed=number)
        steps(net, lk.parameters(net, name), x)
        outputs[name] = net(x).detach()
    assert not torch.equal(outputs["one"], outputs["two"])
    lk.activate(net, "one")
    assert torch.equal(net(x), outputs["one"])
    lk.activate(net, None)
    assert torch.equal(net(x), before)
    lk.activate(net, "two")
    lk.detach(net, "two")
    assert torch.equal(net(x), outputs["one"]), "the one that is left computes"
    lk.detach(net)
    assert torch.equal(net(x), before)


def test_a_part_with_an_adapter_of_its_own_is_refused() -> None:
    net = nn.Sequential(small_net(), nn.Linear(4, 8))
    lk.attach(net[0], lk.Lora(rank=2, target_modules=("0",)))
    with pytest.raises(ConfigError, match="A part of this module has an adapter of its own"):
        lk.attach(net, lk.Lora(rank=2, target_modules=("1",)), name="second")
    lk.detach(net[0])
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_module_with_a_configuration_of_its_own() -> None:
    net = small_net()
    net.config = {"width": 8}
    assert len(lk.attach(net, lk.Lora(rank=2)).entries) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: lk.attach(net, lk.Lora(target_modules=("5",))), "No module matches target '5'"),
        (lambda net: lk.attach(net, lk.Lora(rank=0)), "lora.rank is 0; it must be 1 or more"),
        (lambda net: (lk.attach(net, lk.Lora(rank=2)), lk.attach(net, lk.Lora(rank=2))), "'default' is already attached"),
        (lk.detach, "No adapter is attached to this module"),
        (lk.parameters, "No adapter 'default' is on the model"),
        (lambda net: lk.attach(net, lk.Adapter({})), "The adapter is empty"),
    ],
)
def test_mistakes_are_one_message(call: object, message: str) -> None:
    net = small_net()
    with pytest.raises(ConfigError, match=message):
        call(net)  # type: ignore[operator]


def test_a_text_is_a_list_of_one_target() -> None:
    assert len(lk.attach(small_net(), lk.Lora(rank=2, target_modules="all-linear")).entries) == 2  # type: ignore[arg-type]

"""AdamW against torch's plain one, LoRA+, and exact restoring."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lorakeet.errors import ConfigError
from lorakeet.train.optimizer import Optimizer, is_b
from lorakeet.train.spec import TrainSpec


def parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.q_proj.A": (4, 9), "a.q_proj.B": (7, 4), "head.weight": (3, 5), "a.q_proj.magnitude": (7,)}
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def walk(params: dict[str, Parameter], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(params.values()):
            parameter.grad = torch.sin(parameter.detach() * (index + 1) + step)
        optimizer.step(0.01 * (step + 1))


def test_equals_torch_adamw() -> None:
    spec = TrainSpec(weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6)
    ours, theirs = parameters(), parameters()
    walk(ours, Optimizer(ours, spec), range(4))
    reference = torch.optim.AdamW(list(theirs.values()), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)
    for step in range(4):
        for index, parameter in enumerate(theirs.values()):
            parameter.grad = torch.sin(parameter.detach() * (index + 1) + step)
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_lora_plus_moves_b_faster_and_nothing_else() -> None:
    plain, plus = parameters(), parameters()
    before = {name: value.detach().clone() for name, value in plain.items()}
    walk(plain, Optimizer(plain, TrainSpec()), range(1))
    walk(plus, Optimizer(plus, TrainSpec(b_learning_rate_ratio=16.0)), range(1))
    for name in plain:
        factor = 16 if is_b(name) else 1
        torch.testing.assert_close(plus[name] - before[name], factor * (plain[name] - before[name]), rtol=1e-3, atol=1e-5)
    assert [name for name in plain if is_b(name)] == ["a.q_proj.B"]


def test_restored_state_goes_on_bit_for_bit() -> None:
    whole, broken = parameters(), parameters()
    spec = TrainSpec(weight_decay=0.01)
    walk(whole, Optimizer(whole, spec), range(6))
    first = Optimizer(broken, spec)
    walk(broken, first, range(3))
    state = first.state()
    second = Optimizer(broken, spec)
    second.load(state)
    walk(broken, second, range(3, 6))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert len(state) == 3 * len(whole)


def test_gradients_are_forgotten_after_a_step() -> None:
    params = parameters()
    walk(params, Optimizer(params, TrainSpec()), range(1))
    assert all(parameter.grad is None for parameter in params.values())


def test_nothing_to_train_or_not_in_fp32_is_refused() -> None:
    with pytest.raises(ConfigError, match="none"):
        Optimizer({}, TrainSpec())
    with pytest.raises(ConfigError, match=r"x\.A"):
        Optimizer({"x.A": Parameter(torch.zeros(2, dtype=torch.bfloat16))}, TrainSpec())


def test_cut_moments_are_those_of_the_parameter_that_was_small_from_the_start() -> None:
    """AdamW works number by number: cut after three steps, it goes on as if the other rows had never been there."""
    whole, small = parameters(), parameters()
    rows = torch.tensor([0, 2])
    small["a.q_proj.A"] = Parameter(small["a.q_proj.A"].detach()[rows].clone())
    small["a.q_proj.B"] = Parameter(small["a.q_proj.B"].detach()[:, rows].clone())
    spec = TrainSpec(weight_decay=0.01)
    first, second = Optimizer(whole, spec), Optimizer(small, spec)
    walk(whole, first, range(3))
    walk(small, second, range(3))
    for name, dim in (("a.q_proj.A", 0), ("a.q_proj.B", 1)):
        shape = whole[name].shape
        whole[name].data = whole[name].data.index_select(dim, rows)
        first.keep(name, shape, dim, rows)
    assert first.state().keys() == second.state().keys()
    for key, value in second.state().items():  # the last numbers of a tensor are rounded in another way than those in vectors
        torch.testing.assert_close(first.state()[key], value, rtol=1e-6, atol=1e-9)
    walk(whole, first, range(3, 6))
    walk(small, second, range(3, 6))
    for name in whole:
        torch.testing.assert_close(whole[name], small[name], rtol=1e-5, atol=1e-7)


def test_moments_that_are_not_there_yet_need_no_cut() -> None:
    live = parameters()
    optimizer = Optimizer(live, TrainSpec())
    optimizer.keep("a.q_proj.A", live["a.q_proj.A"].shape, 0, torch.tensor([1]))
    assert optimizer.state() == {}

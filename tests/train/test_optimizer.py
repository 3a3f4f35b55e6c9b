"""AdamW against torch's plain one, LoRA+, exact restoring, and the learning-rate schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from lorakeet.errors import ConfigError
from lorakeet.train.optimizer import Optimizer, is_b
from lorakeet.train.schedule import factor, warmup_steps
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


def curve(shape: str, *, total: int = 20, warmup: int = 4) -> list[float]:
    return [factor(step, total, warmup=warmup, shape=shape) for step in range(1, total + 1)]


def test_warmup_rises_evenly_to_one() -> None:
    for shape in ("linear", "cosine", "constant"):
        assert curve(shape)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_falls_by_equal_parts() -> None:
    values = curve("linear")[4:]
    assert values == pytest.approx([1 - k / 16 for k in range(16)])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = curve("cosine")[4:]
    assert values[8] == pytest.approx(0.5)
    assert values[4] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert values == sorted(values, reverse=True)


def test_constant_stays() -> None:
    assert set(curve("constant")[4:]) == {1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 50])
@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.99])
def test_every_step_learns_and_none_exceeds_one(shape: str, total: int, fraction: float) -> None:
    values = curve(shape, total=total, warmup=warmup_steps(total, fraction))
    assert len(values) == total
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1

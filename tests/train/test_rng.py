"""All generators go on where they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from lorakeet.train import rng
from lorakeet.train.task import gradients_by_batch

CARD = torch.device("cuda", 0)


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(), torch.randn(1).item()]


@pytest.mark.parametrize("drawn_before", [0, 1, 2])  # after an odd number of normal draws, half a pair is kept in store
def test_states_survive_a_file(drawn_before: int) -> None:
    rng.seed_all(11)
    for _ in range(drawn_before):
        draw()
    kept = load(save(rng.states()))
    first = [draw() for _ in range(3)]
    rng.seed_all(12)
    assert draw() != first[0]
    rng.restore(kept)
    assert [draw() for _ in range(3)] == first


def test_the_seed_decides_all() -> None:
    rng.seed_all(2**40 + 1)
    first = draw()
    rng.seed_all(2**40 + 1)
    assert draw() == first


def test_the_states_of_the_cpu_and_a_device_go_together(second_generator: torch.Generator) -> None:
    begun = rng.seeded(7, CARD)
    rng.draw_from(begun, CARD)
    first = [torch.rand(2), torch.rand(2, generator=second_generator)]
    between = rng.drawn(CARD)
    second = [torch.rand(2), torch.rand(2, generator=second_generator)]
    for states, expected in ((begun, first), (between, second), (begun, first)):
        rng.draw_from(states, CARD)
        again = [torch.rand(2), torch.rand(2, generator=second_generator)]
        assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))
    assert torch.equal(rng.seeded(7, torch.device("cpu"))[0], torch.Generator().manual_seed(7).get_state())
    assert rng.cuda_devices(torch.device("cpu")) == [] and rng.cuda_devices(CARD) == [CARD]


def test_a_process_that_does_not_use_a_gpu_asks_for_nothing_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the CPU of a machine with a GPU: what asks for the state of its generator would take memory there."""

    def refuse(*_: object) -> None:
        raise AssertionError("CUDA is initialised")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("current_device", "get_rng_state", "get_rng_state_all", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    kept = rng.states()
    assert not any(name.startswith("cuda") for name in kept) and rng.current_cuda_devices() == []
    rng.restore({**kept, "cuda.0": kept["torch"]})  # of a run that was on a GPU
    weight = torch.ones(1, requires_grad=True)
    assert gradients_by_batch(lambda batch: (batch * weight).sum(), [torch.ones(1)], 1.0).item() == 1.0

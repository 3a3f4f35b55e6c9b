"""The shapes of the learning-rate schedules."""

from __future__ import annotations

import math

import pytest

from lorakeet.train.schedule import factor, warmup_steps


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

from __future__ import annotations

import math
import re

import pytest

from lorakeet.evaluate.compare import Paired
from lorakeet.evaluate.intervals import proportion
from lorakeet.evaluate.report import charts
from lorakeet.evaluate.report.report import ChartPoint, Curves


@pytest.mark.parametrize(
    "values", [[0.6, 0.93], [0.0], [-0.6, 0.02], [3.0, 3.0], [1e-9, 2e-9], [], [math.inf, 1.0], [12.0, 4000.0]]
)
def test_axis_holds_its_values_and_has_round_distinct_ticks(values: list[float]) -> None:
    scale = charts.axis(values)
    assert all(scale.low <= value <= scale.high for value in values if math.isfinite(value))
    labels = [scale.label(tick) for tick in scale.ticks]
    assert 1 <= len(labels) <= 7 and len(set(labels)) == len(labels)
    assert all(0 <= scale.at(value) <= 100 for value in [*values, scale.low - 1, math.nan])


def test_quarter_ticks_keep_their_digits() -> None:
    assert charts.Axis(0, 1, (0.25, 0.5, 0.75)).label(0.5) == "0.50"


def test_zero_is_kept_on_the_axis_and_drawn() -> None:
    estimate = proportion(90, 100)
    scale = charts.interval_axis([estimate], zero=True)
    assert scale.low <= 0 and 'class="zero"' in charts.interval_bar(estimate, scale, "adapter", zero=True)


def test_one_square_a_row_and_few_for_many_rows() -> None:
    assert charts.squares(Paired(3, 2, 1, 4)).count("<i ") == 10
    many = charts.squares(Paired(30_000, 2, 1, 9_000))
    assert 900 <= many.count("<i ") <= 1004 and 'class="broke"' in many


def test_the_kept_checkpoint_is_marked_and_a_lone_point_survives() -> None:
    points = tuple(ChartPoint(step, 1 / (step + 1), 0.0, 1.0) for step in range(0, 50, 10))
    drawing = charts.learning_curves(Curves(train=points, held_out=points, learning_rate=points, best_step=20))
    assert drawing.count("kept") == 1 and drawing.count('class="best"') == 1
    assert "polyline" not in charts.learning_curves(Curves(held_out=(ChartPoint(1, math.nan),)))


def test_no_coordinate_is_nan() -> None:
    points = (ChartPoint(0, math.nan), ChartPoint(1, math.inf), ChartPoint(2, 1.0), ChartPoint(3, 0.5))
    drawing = charts.learning_curves(Curves(train=points, held_out=points))
    assert not re.search(r"nan|inf", drawing)

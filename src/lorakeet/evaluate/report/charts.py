"""Charts of the report as inline SVG and HTML; all data is escaped.

Coordinates are percentages, so that a chart fills its column at any width while its text keeps its size. Colours are
classes that report.css defines for light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lorakeet.evaluate.calibration import ReliabilityBin
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.paired import Paired
from lorakeet.evaluate.wording import number

_SQUARES = 1000  # most squares drawn; with more rows, each stands for several


@dataclass(frozen=True)
class ChartPoint:
    """A value after `step` optimizer steps, with its interval if it has one."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curves:
    """Train and held-out loss and learning rate by step; `best_step` is the kept checkpoint, `ended` why training ended.

    `preferred` is the share of held-out pairs whose chosen answer is preferred, of a run on pairs.
    """

    train: tuple[ChartPoint, ...] = ()
    held_out: tuple[ChartPoint, ...] = ()
    learning_rate: tuple[ChartPoint, ...] = ()
    preferred: tuple[ChartPoint, ...] = ()
    best_step: int | None = None
    ended: str = ""


@dataclass(frozen=True)
class Axis:
    """A range of numbers drawn over 0 to 100 % of a width, with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The position of `value` in percent, clamped to the chart; NaN is at its end."""
        position = 100 * (value - self.low) / (self.high - self.low)
        return 100.0 if math.isnan(position) else round(min(100.0, max(0.0, position)), 2)

    def label(self, tick: float, unit: str | None = None) -> str:
        """A tick's number; with a `unit` that of a share, in percent or points."""
        if unit is not None:
            return f"{round(100 * tick, 2) + 0.0:g}{unit}".replace("-", "−")
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else tick
        digits = next((count for count in range(12) if abs(round(step, count) - step) < 1e-9 * abs(step)), 12)
        return number(tick + 0.0, digits)


def axis(values: Sequence[float], *, zero: bool = False, count: int = 4) -> Axis:
    """The axis around the finite `values`, with about `count` ticks; `zero` includes 0."""
    finite = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.06 * span, high + 0.06 * span
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = size * min((factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw), default=10)
    first = math.ceil(low / step)
    ticks = tuple(round(step * index, 12) for index in range(first, math.floor(high / step) + 1))
    return Axis(low, high, ticks)


def interval_axis(estimates: Sequence[Estimate], *, zero: bool = False) -> Axis:
    """The axis that includes every value and interval of `estimates`."""
    return axis([edge for item in estimates for edge in (item.low, item.value, item.high)], zero=zero)


def interval_bar(estimate: Estimate, scale: Axis, role: str, *, zero: bool = False) -> Markup:
    """A dot at the value with a line over its interval, on light tick lines; the page's text has the number."""
    parts = [svg_line(scale.at(tick), 0, scale.at(tick), 100, "zero" if zero and tick == 0 else "tick") for tick in scale.ticks]
    low, high, middle = scale.at(estimate.low), scale.at(estimate.high), scale.at(estimate.value)
    parts.append(svg_line(low, 50, high, 50, f"bar {role}"))
    parts.append(Markup('<circle cx="{}%" cy="50%" r="5.5" class="dot {}"/>').format(middle, role))
    return Markup('<svg class="track" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def axis_labels(scale: Axis, unit: str | None = None) -> Markup:
    """The numbers of the ticks, each centred on its tick; with a `unit` those of a share."""
    spans = [Markup('<span style="left:{}%">{}</span>').format(scale.at(tick), scale.label(tick, unit)) for tick in scale.ticks]
    return Markup('<div class="ticks" aria-hidden="true">{}</div>').format(Markup("").join(spans))


def squares(paired: Paired) -> Markup:
    """One square per held-out row, coloured by which system is right; above 1000 rows a square stands for several."""
    each = max(1, math.ceil(paired.n / _SQUARES))
    counts = (
        ("both-right", paired.both),
        ("fixed", paired.only_left),
        ("broke", paired.only_right),
        ("both-wrong", paired.neither),
    )
    cells = Markup("").join(Markup('<i class="{}"></i>').format(kind) * math.ceil(count / each) for kind, count in counts)
    return Markup('<div class="squares" aria-hidden="true" data-each="{}">{}</div>').format(each, cells)


def learning_curves(curves: Curves) -> Markup:
    """Train loss (each step faint, running mean strong) and held-out loss by step, the best checkpoint marked."""
    points = [*curves.train, *curves.held_out]
    last = max((point.step for point in points), default=1)
    steps = Axis(0, max(1, last), axis([0, last], count=5).ticks)
    steps = Axis(0, steps.high, tuple(tick for tick in steps.ticks if 0 <= tick <= last and tick == int(tick)))
    edges = [edge for point in points for edge in (point.value, point.low, point.high) if edge is not None]
    values = axis(_without_extremes(edges))
    shapes = [svg_line(0, 100 - values.at(tick), 100, 100 - values.at(tick), "tick") for tick in values.ticks]
    shapes += [polyline(curves.train, steps, values, "train raw"), polyline(_running_mean(curves.train), steps, values, "train")]
    shapes.append(polyline(curves.held_out, steps, values, "held-out"))
    best = next((point for point in curves.held_out if point.step == curves.best_step), None)
    if best is not None:
        shapes.append(svg_line(steps.at(best.step), 0, steps.at(best.step), 100, "best"))
    for point in curves.held_out:
        x, y = steps.at(point.step), 100 - values.at(point.value)
        if point.low is not None and point.high is not None:
            shapes.append(svg_line(x, 100 - values.at(point.low), x, 100 - values.at(point.high), "whisker held-out"))
        mark = "dot held-out kept" if point is best else "dot held-out"
        shapes.append(Markup('<circle cx="{}%" cy="{}%" r="{}" class="{}"/>').format(x, y, 6.5 if point is best else 3.5, mark))
    return plot(shapes, steps, values, _rate_strip(curves.learning_rate, steps))


def share_curve(points: Sequence[ChartPoint]) -> Markup:
    """A share from 0 to 1 by step, with a line at a half."""
    last = max((point.step for point in points), default=1)
    steps, unit = Axis(0, max(1, last), axis([0, last], count=5).ticks), Axis(0, 1, (0.0, 0.25, 0.5, 0.75, 1.0))
    steps = Axis(0, steps.high, tuple(tick for tick in steps.ticks if 0 <= tick <= last and tick == int(tick)))
    shapes = [svg_line(0, 100 - unit.at(tick), 100, 100 - unit.at(tick), "tick") for tick in unit.ticks]
    shapes += [svg_line(0, 50, 100, 50, "best"), polyline(points, steps, unit, "held-out")]
    dot = Markup('<circle cx="{}%" cy="{}%" r="3.5" class="dot held-out"/>')
    shapes += [dot.format(steps.at(point.step), 100 - unit.at(point.value)) for point in points]
    return plot(shapes, steps, unit, unit=" %")


def _rate_strip(rates: Sequence[ChartPoint], steps: Axis) -> Markup:
    top = max((point.value for point in rates), default=0.0)
    if top <= 0:
        return Markup("")
    shape = polyline(rates, steps, Axis(0, top * 1.08, ()), "rate")
    label = Markup('<span class="strip-label">learning rate, peak {}</span>').format(f"{top:.1e}".replace("e-0", "e-"))
    return Markup('<div class="strip">{}<svg class="area" aria-hidden="true">{}</svg></div>').format(label, shape)


def reliability_plot(bins: Sequence[ReliabilityBin], role: str) -> Markup:
    """Accuracy against confidence, one dot per bin with its interval; a perfectly calibrated system is on the diagonal."""
    unit = Axis(0, 1, (0.0, 0.25, 0.5, 0.75, 1.0))
    shapes = [svg_line(0, 100 - unit.at(tick), 100, 100 - unit.at(tick), "tick") for tick in unit.ticks]
    shapes.append(svg_line(0, 100, 100, 0, "diagonal"))
    for entry in bins:
        x, estimate = unit.at(entry.confidence), entry.accuracy
        shapes.append(svg_line(x, 100 - unit.at(estimate.low), x, 100 - unit.at(estimate.high), f"whisker {role}"))
        shapes.append(Markup('<circle cx="{}%" cy="{}%" r="5" class="dot {}"/>').format(x, 100 - unit.at(estimate.value), role))
    places = [(100 - unit.at(tick), unit.label(tick, " %")) for tick in unit.ticks]
    marks = Markup("").join(Markup('<span style="top:{}%">{}</span>').format(*place) for place in places)
    return Markup('<div class="plot square"><div class="y">{}</div><svg class="area" aria-hidden="true">{}</svg>{}</div>').format(
        marks, Markup("").join(shapes), axis_labels(Axis(0, 1, (0.0, 0.5, 1.0)), " %")
    )


def plot(shapes: Sequence[Markup], across: Axis, up: Axis, below: str = "", unit: str | None = None) -> Markup:
    """The frame of a plot: `shapes` with the numbers of both axes, `up` in its unit, and what stands below them."""
    marks = Markup("").join(
        Markup('<span style="top:{}%">{}</span>').format(round(100 - up.at(tick), 2), up.label(tick, unit)) for tick in up.ticks
    )
    return Markup('<div class="plot"><div class="y">{}</div><svg class="area" aria-hidden="true">{}</svg>{}{}</div>').format(
        marks, Markup("").join(shapes), axis_labels(across), below
    )


def svg_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line between two points in percent."""
    ends = (round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2))
    return Markup('<line x1="{}%" y1="{}%" x2="{}%" y2="{}%" class="{}"/>').format(*ends, kind)


def polyline(points: Sequence[ChartPoint], steps: Axis, values: Axis, kind: str) -> Markup:
    """A line through `points`, in a stretched box of 100 by 100 with a constant stroke width."""
    usable = [point for point in points if math.isfinite(point.value)]
    if len(usable) < 2:
        return Markup("")
    coordinates = " ".join(f"{steps.at(point.step)},{round(100 - values.at(point.value), 2)}" for point in usable)
    return Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" x="0" y="0">'
        '<polyline points="{}" class="{}"/></svg>'
    ).format(coordinates, kind)


def _running_mean(points: Sequence[ChartPoint]) -> list[ChartPoint]:
    reach = len(points) // 40
    result: list[ChartPoint] = []
    for index, point in enumerate(points):
        window = [near.value for near in points[max(0, index - reach) : index + reach + 1] if math.isfinite(near.value)]
        if window:
            result.append(ChartPoint(point.step, sum(window) / len(window)))
    return result


def _without_extremes(edges: Sequence[float]) -> list[float]:
    """The values, without the highest 2 % if these would take up more than half of the chart."""
    finite = sorted(edge for edge in edges if math.isfinite(edge))
    usual = finite[: max(1, math.ceil(len(finite) * 0.98))]
    return usual if finite and finite[-1] - finite[0] > 2 * (usual[-1] - usual[0]) else finite

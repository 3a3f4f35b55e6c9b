"""Ranks in a report: the map of layer × matrix, the rank curve, and the trials of a search."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report.charts import Axis, ChartPoint, axis, plot, polyline, svg_line


@dataclass(frozen=True)
class RankCell:
    """The rank of one matrix of one block; `layer` is empty outside the blocks."""

    layer: str
    matrix: str
    rank: int


@dataclass(frozen=True)
class RankCut:
    """The state after a rank cut: parameters of all pairs, pairs of rank 1 or more, the lowest and highest rank."""

    step: int
    parameters: int
    pairs: int
    lowest: int
    highest: int


@dataclass(frozen=True)
class RankMap:
    """The ranks of a plan, drawn as layer × matrix; `cuts` are the rank cuts during training, if any.

    The first, of step 0, is the state at the start of training.
    """

    cells: tuple[RankCell, ...]
    cuts: tuple[RankCut, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.layer for cell in self.cells))

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.matrix for cell in self.cells))

    @property
    def highest(self) -> int:
        return max(cell.rank for cell in self.cells)

    def rank(self, layer: str, matrix: str) -> int:
        """The rank of a matrix; 0 without a pair."""
        return next((cell.rank for cell in self.cells if (cell.layer, cell.matrix) == (layer, matrix)), 0)


@dataclass(frozen=True)
class CurvePoint:
    """An adapter cut to `parameters`: its gain over the base in loss, and its comparisons with the uncut adapter.

    `why_not` says why it is not shown to be as good as the uncut adapter; empty if it is. The uncut adapter has no comparisons.
    """

    name: str
    parameters: int
    gain: Estimate
    against_full: tuple[Comparison, ...] = ()
    why_not: str = ""


@dataclass(frozen=True)
class RankCurve:
    """Held-out gain by parameters, in `unit`; `marked` is the smallest point that satisfies `rule`, empty if none does."""

    points: tuple[CurvePoint, ...]
    rule: str
    unit: str
    marked: str = ""


@dataclass(frozen=True)
class TrialResult:
    """One trial of a search: its held-out loss, and its comparison with the settings of the run file, if measured."""

    name: str
    settings: str
    steps: int
    tokens: int
    ended: str
    diverged: bool = False
    loss: Estimate | None = None
    against_start: Comparison | None = None


MEASURE = "loss in nats a token"  # what trials on text are compared by


@dataclass(frozen=True)
class Search:
    """All trials of a search on `rows` held-out rows, the power of the comparison, and the conclusion.

    `winner` is the trial whose settings were taken, `best` the one of lowest loss, perhaps not confirmed on other rows. `measure`
    is what they are compared by.
    """

    trials: tuple[TrialResult, ...]
    rows: int
    power: str
    winner: str = ""
    conclusion: str = ""
    best: str = ""
    measure: str = MEASURE


def curve_plot(curve: RankCurve) -> Markup:
    """Gain against parameters, with intervals; the marked point is larger."""
    points = [ChartPoint(point.parameters, point.gain.value, point.gain.low, point.gain.high) for point in curve.points]
    last = max(point.step for point in points)
    ticks = tuple(tick for tick in axis([0, last], count=4).ticks if 0 <= tick <= last)
    across = Axis(0, last * 1.04, ticks)
    values = axis([edge for point in points for edge in (point.low, point.value, point.high) if edge is not None], zero=True)
    heights = [(100 - values.at(tick), "zero" if tick == 0 else "tick") for tick in values.ticks]
    shapes = [svg_line(0, height, 100, height, kind) for height, kind in heights]
    shapes.append(polyline(points, across, values, "held-out"))
    for point, named in zip(points, curve.points, strict=True):
        x, y = across.at(point.step), 100 - values.at(point.value)
        shapes.append(svg_line(x, 100 - values.at(point.low or 0.0), x, 100 - values.at(point.high or 0.0), "whisker held-out"))
        mark = named.name == curve.marked
        kind, radius = ("dot held-out kept", 6.5) if mark else ("dot held-out", 3.5)
        shapes.append(Markup('<circle cx="{}%" cy="{}%" r="{}" class="{}"/>').format(x, y, radius, kind))
    return plot(shapes, across, values)

"""Seconds of training to a held-out loss, interpolated between the steps at which it was evaluated. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

Point = dict[str, float]  # step, seconds of training until then, loss


def curve(seconds: Sequence[float], before: float, judged: Mapping[str, float]) -> list[Point]:
    """A point for each evaluated step. `before`: seconds of training's own work before the first step, which count."""
    until = list(accumulate(seconds, initial=before))
    return [{"step": step, "seconds": until[step], "loss": judged[str(step)]} for step in sorted(map(int, judged))]


def shared_target(curves: Sequence[Sequence[Point]]) -> float:
    """The lowest loss that every one of the curves reaches."""
    return max(min(point["loss"] for point in points) for points in curves)


def reached(points: Sequence[Point], target: float, axis: str) -> float | None:
    """The seconds, or the steps, at which the loss first was `target`, on straight lines between the points; None: never."""
    if points[0]["loss"] <= target:
        return points[0][axis]
    for above, below in pairwise(points):
        if below["loss"] <= target:
            share = (above["loss"] - target) / (above["loss"] - below["loss"])
            return above[axis] + share * (below[axis] - above[axis])
    return None


def at_target(points: Sequence[Point], target: float) -> dict[str, Any]:
    """What a result says of one run. The steps tell apart who is faster a step from who needs fewer of them."""
    found = {axis: reached(points, target, axis) for axis in ("seconds", "step")}
    return {"points": list(points), "lowest_loss": min(point["loss"] for point in points), **found}

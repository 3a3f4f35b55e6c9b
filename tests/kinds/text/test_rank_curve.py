"""`kinds.text.rank_curve`: which size is marked, whatever single ones scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.kinds.text import rank_curve as curves
from tiny.runs import quiet


@dataclass(frozen=True)
class MadeUpEvaluator:
    """Forty rows whose mean loss is 3 with the base, 1 with the whole adapter, and as `mean` says with the cut on the model."""

    mean: dict[str, float]
    config: Any
    text: Any
    encoder: Any
    name: str = ""
    console: Any = field(default_factory=quiet)

    def fitting(self) -> list[int]:
        return list(range(40))

    def scores(self, rows: list[int], system: str) -> RowLosses:
        mean = 3.0 if system == "base" else self.mean.get(self.name, 1.0)
        return RowLosses(system, mean + 0.2 * np.sin(np.arange(40.0)), np.ones(40, int))


def test_a_cut_is_taken_only_below_larger_ones_that_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the luckiest of eight cuts would pass for the smallest that loses nothing."""
    mean: dict[str, float] = {}
    monkeypatch.setattr(curves, "attach", lambda model, adapter, name: mean.update({name: adapter}))
    monkeypatch.setattr(curves, "eject", lambda model, name: mean.pop(name))
    lost = {10: 0.0, 50: 0.0, 40: 0.0, 30: 0.5, 20: 0.0}
    cuts: list[Any] = [SimpleNamespace(name=f"cut to {size}", parameters=size, adapter=1 + less) for size, less in lost.items()]
    parts = SimpleNamespace(evaluate=EvaluateSpec()), SimpleNamespace(model=None), SimpleNamespace(labels=())
    evaluator: Any = MadeUpEvaluator(mean, *parts)
    curve, margin = curves.rank_curve(evaluator, cuts, None, 60, (0.01, 0.01))
    assert curve.marked == "cut to 40" and margin.loss == pytest.approx(0.01, rel=0.1)

"""How much of what an adapter gained is left in another form of it: a share with its interval, on the same rows."""

from __future__ import annotations

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.intervals import Estimate, Floats, ratio
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.spec import EvaluateSpec

Scores = Answers | RowLosses


def per_row(scores: Scores) -> Floats:
    """What is to be small, row by row: −log p of the right label, or the row's loss in nats."""
    return scores.surprise if isinstance(scores, Answers) else scores.losses


def surviving_share(base: Scores, adapter: Scores, other: Scores, spec: EvaluateSpec) -> Estimate:
    """Σ(base − other) / Σ(base − adapter): 1 where `other` is as good as the adapter, 0 where it is as its base was.

    Log-loss where rows have labels, else the loss. DataError where the rows differ, or the adapter gained nothing.
    """
    rows = [per_row(scores) for scores in (base, adapter, other)]
    if len({len(values) for values in rows}) > 1:
        raise DataError(f"The systems were measured on {', '.join(str(len(values)) for values in rows)} rows; expected the same.")
    whole, kept = rows[0] - rows[1], rows[0] - rows[2]
    if whole.sum() <= 0:
        raise DataError(
            f"The adapter gained nothing over its base on these {len(whole)} held-out rows ({whole.mean():+.4f} nats a row), so "
            "no share of it can survive. Train it further first."
        )
    return ratio(kept, whole, spec=spec, groups=base.groups)

"""Turns log-probabilities of tokens into label answers, losses and perplexities."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from lorakeet.errors import DataError, Problems
from lorakeet.evaluate.intervals import Estimate, Floats, Integers, ratio
from lorakeet.evaluate.spec import EvaluateSpec


def label_log_probs(table: Floats) -> Floats:
    """Log-probabilities of labels (n, labels) from summed token log-probabilities of the candidates:  log_softmax over labels.

    The sum (not the mean) over a candidate's tokens is the log-likelihood of that answer. Include the token that ends the answer:
    otherwise a label that is a prefix of another ("not", "not good") gets the likelihood of both.
    """
    scores = np.asarray(table, dtype=np.float64)
    if scores.ndim != 2:
        raise DataError(f"The candidate scores have the shape {scores.shape}; expected (rows, labels).")
    usable = np.isfinite(scores).any(axis=1) & ~np.isnan(scores).any(axis=1)
    if not usable.all():
        row = int(np.flatnonzero(~usable)[0])
        found = scores[row].tolist()
        raise DataError(
            f"Row {row} has the candidate scores {found}; expected finite log-probabilities. Evaluate in fp32 or bf16."
        )
    return np.asarray(log_softmax(scores, axis=1))


@dataclass(frozen=True, eq=False)
class RowLosses:
    """One system's loss on rows of any kind: `losses` (n,) = -Σ log p of supervised tokens, `tokens` (n,) their number."""

    system: str
    losses: Floats
    tokens: Integers
    groups: tuple[Hashable, ...] | None = None

    def __post_init__(self) -> None:
        problems = Problems(f"The losses of '{self.system}' cannot be measured", kind=DataError)
        if len(self.losses) < 1 or self.losses.shape != self.tokens.shape:
            counts = f"{len(self.losses)} losses and {len(self.tokens)} token counts"
            problems.add(f"There are {counts}; expected as many of each, at least 1.")
        elif int(self.tokens.min()) < 1:
            row = int(self.tokens.argmin())
            problems.add(f"Row {row} has {int(self.tokens[row])} supervised tokens; expected at least 1. Drop it.")
        if not np.isfinite(self.losses).all():
            row = int(np.flatnonzero(~np.isfinite(self.losses))[0])
            problems.add(f"Row {row} has the loss {self.losses[row]}; expected a finite number. Evaluate in fp32 or bf16.")
        if self.groups is not None and len(self.groups) != len(self.losses):
            problems.add(f"There are {len(self.groups)} group ids for {len(self.losses)} rows; expected one for each row.")
        problems.raise_if_any()


def measure_losses(rows: RowLosses, spec: EvaluateSpec) -> dict[str, Estimate]:
    """`loss` in nats per token (token-weighted, bootstrap over rows or groups) and `perplexity` = exp(loss)."""
    loss = ratio(rows.losses, rows.tokens.astype(np.float64), spec=spec, groups=rows.groups, bounds=(0.0, math.inf))
    return {"loss": loss, "perplexity": loss.map(lambda value: math.exp(value) if value < 700 else math.inf)}

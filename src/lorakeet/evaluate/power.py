"""Power of paired comparisons: the smallest difference that n rows can show, and the rows that a difference needs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from lorakeet.errors import DataError, percent
from lorakeet.evaluate.intervals import Floats

CORRELATION = 0.9  # assumed between two trained adapters' losses on the same row: easy rows are easy for both
POWER = 0.8


@dataclass(frozen=True)
class PairedPower:
    """The power of a paired comparison of losses on `rows` rows, from the spread of one system's losses."""

    rows: int
    spread: float  # standard deviation of a row's difference, nats per token
    confidence: float
    unit: str = "rows"  # the independent units

    @property
    def smallest(self) -> float:
        """The difference in nats per token that is shown with a probability of 80 %: (z_{1−α/2} + z_{0.8})·sd/√n."""
        return self._reach * self.spread / math.sqrt(self.rows)

    def rows_for(self, difference: float) -> int:
        """Rows that show a difference in nats per token with a probability of 80 %."""
        return max(2, math.ceil((self._reach * self.spread / difference) ** 2))

    @property
    def _reach(self) -> float:
        return float(special.ndtri(0.5 + self.confidence / 2) + special.ndtri(POWER))

    def sentence(self, difference: float, half_of: str = "") -> str:
        """In words, with the rows that `difference` needs if there are too few; the rows may be `half_of` others."""
        base = (
            f"{self.rows} {self.unit} show a difference of {self.smallest:.3g} nats a token or more with a probability of "
            f"{percent(POWER, 0)} (if losses of two trials correlate by {CORRELATION:g} over {self.unit})."
        )
        needed = self.rows_for(difference)
        if needed <= self.rows:
            return base
        both = f", and they are half of {half_of}: hold out about {2 * needed:,} {self.unit}" if half_of else ""
        return f"{base} Too few {self.unit} to distinguish trials by {difference:g}: that needs about {needed:,}{both}."


def rows_below(rows: int, half_width: float, margin: float, confidence: float) -> int:
    """Rows whose interval ends within `margin` of 0 with a probability of 80 %, if that of `rows` has half width `half_width`.

    The middle varies too: z_{1−α/2} of the half width must become z_{1−α/2} + z_{0.8} of it (∝ √n).
    """
    likely = 1 + float(special.ndtri(POWER) / special.ndtri(0.5 + confidence / 2))
    return math.ceil(rows * (likely * half_width / margin) ** 2)


def paired_power(losses: Floats, tokens: Floats, *, confidence: float, groups: Sequence[Hashable] | None = None) -> PairedPower:
    """From one system's summed losses (n,) and tokens (n,): sd of a row's difference is √(2·(1 − ρ)) times that of its loss.

    The loss per token is a ratio r = Σl/Σt, so a row counts by its residual (l − r·t)/mean(t); with `groups`, a group does.
    Raises DataError below 2 rows.
    """
    if groups is not None:
        numbers: dict[Hashable, int] = {}
        index = [numbers.setdefault(group, len(numbers)) for group in groups]
        losses, tokens = (np.bincount(index, weights=values).astype(np.float64) for values in (losses, tokens))
    unit = "rows" if groups is None else "groups of rows"
    if len(losses) < 2:
        raise DataError(f"{len(losses)} held-out {unit} cannot distinguish two trials; hold out 2 or more.")
    residuals = (losses - losses.sum() / tokens.sum() * tokens) / tokens.mean()
    spread = float(np.std(residuals, ddof=1)) * math.sqrt(2 * (1 - CORRELATION))
    return PairedPower(len(losses), spread, confidence, unit)

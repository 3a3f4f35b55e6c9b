"""Non-inferiority: a system is as good as another if its whole interval lies within a margin that was fixed beforehand.

"No difference shown" does not say that: few rows never show one. A system whose interval lies wholly on the worse side is worse,
however wide the margin, unless the difference is too small to be written in four digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.power import rows_below
from lorakeet.evaluate.wording import metric_words

LEAST = 20  # rows of which an interval is believed: fewer may agree by chance
SHOWN = 5e-5  # the smallest difference that is not written as 0.0000: below it, rounding of arithmetic looks like a difference


@dataclass(frozen=True)
class Margin:
    """How much worse a system may be than the one on the right of a comparison: in nats of loss, and in the task's metric."""

    loss: float
    metric: float

    def of(self, found: Comparison) -> float:
        """The margin of one comparison."""
        return self.loss if found.metric in ("loss", "log_loss") else self.metric

    def why_not(self, comparisons: Sequence[Comparison]) -> str:
        """Why the left system is not shown to be as good as the right one, in words; empty if it is."""
        return "; ".join(said for found in comparisons if (said := self._shortfall(found)))

    def _shortfall(self, found: Comparison) -> str:
        least, most = worse_by(found)
        if found.difference.n < LEAST:
            return f"{found.difference.n} rows are too few to show anything"
        words, allowed = metric_words(found.metric), self.of(found)
        if least < SHOWN and most <= max(allowed, SHOWN):
            return ""
        name = words.title.lower()
        if least >= SHOWN:
            return f"{name} is worse"
        return f"{name} may be {words.change(most, 4)} worse, {words.change(allowed, 4)} is allowed".replace("+", "")

    def rows_needed(self, comparisons: Sequence[Comparison]) -> int | None:
        """Rows that show the left system to be as good with a probability of 80 %, if the measured differences are true.

        None if it is worse, or too much worse, by its own estimate.
        """
        needed = 0
        for found in comparisons:
            least, most = worse_by(found)
            value = -found.difference.value if found.higher_is_better else found.difference.value
            if least >= SHOWN or value >= self.of(found):
                return None
            if most > self.of(found):
                n, confidence = found.difference.n, found.difference.confidence
                needed = max(needed, rows_below(n, most - value, self.of(found) - value, confidence))
        return needed or None


def fewest_rows(margin: float, confidence: float) -> int | None:
    """Rows of which equal answers are within `margin` of a share: fewer show it of no system whatever it answers.

    Tango's interval without a discordant row reaches to z²/(n + z²) (evaluate/paired). None for a margin of 0.
    """
    square = float(special.ndtri((1 + confidence) / 2)) ** 2
    return math.ceil(square * (1 - margin) / margin) if margin > 0 else None


def least_margin(rows: int, confidence: float) -> float:
    """The margin of a share within which equal answers of so many rows are: no smaller one can be shown (`fewest_rows`)."""
    square = float(special.ndtri((1 + confidence) / 2)) ** 2
    return square / (rows + square)


def worse_by(found: Comparison) -> tuple[float, float]:
    """The interval of how much worse the left system is; negative where it is better."""
    low, high = found.difference.low, found.difference.high
    return (-high, -low) if found.higher_is_better else (low, high)

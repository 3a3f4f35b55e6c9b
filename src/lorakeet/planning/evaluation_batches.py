"""How many tokens of an evaluation pass together: examples are computed, and weights read, once for more rows.

Training holds far more of each token than an evaluation does. What the evaluation leaves of a plan's peak is given to its
batches, and the peak stays as it is planned.
"""

from __future__ import annotations

from typing import Any

import torch

from lorakeet.models.text.model import COUNTS
from lorakeet.planning.forecast_text_run import COUNT_BYTES
from lorakeet.planning.rehearse_text import FINAL
from lorakeet.runs.residency import Residency

WIDER = 4  # times the usual tokens, at most: more saves little
FIXED = ("runtime", "base", "adapter")  # kinds of memory that do not grow with the tokens of a batch


def tokens_within_peak(residency: Residency[Any], usual: int, device: torch.device) -> int:
    """`usual` tokens, or two or WIDER times as many where the plan's peak stays the same; never under a given budget.

    Where nothing is planned: WIDER times as many on a CPU, as many as usual elsewhere.
    """
    if residency.given:
        return usual
    if residency.plan is None:
        return usual * WIDER if device.type == "cpu" and not residency.budget else usual
    phases = {phase.name: phase for phase in residency.plan.forecast.phases}
    if FINAL not in phases:
        return usual
    final = phases[FINAL]
    growing = sum(size for kind, size in final.kinds.items() if kind not in FIXED)
    code = 2 * COUNTS * COUNT_BYTES if device.type == "cpu" else 0  # of products with further numbers of tokens
    left = residency.plan.peak - final.bytes - code
    times = WIDER
    while times > 1 and (times - 1) * growing > left:
        times //= 2
    return usual * times

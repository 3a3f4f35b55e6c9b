"""`RanksSpec`, the `ranks` part of a run file: how ranks are chosen. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from lorakeet.errors import ConfigError
from lorakeet.setting import setting
from lorakeet.settings import require_types

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_COUNT = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmb]?)", re.IGNORECASE)


@dataclass(frozen=True)
class RanksSpec:
    """Ranks as given, allocated by a score on training rows, or pruned during training."""

    choose: Literal["given", "auto", "prune"] = setting(
        "given", "given: by lora.rank and lora.rank_pattern; auto: by measured benefit; prune: cut during training."
    )
    budget: str | None = setting(
        None, "Parameters of all pairs, such as 1.5M; by default those of lora.rank (auto) or two thirds of them (prune)."
    )
    score: Literal["gradient", "activation", "sensitivity"] = setting(
        "gradient", "What auto scores a rank by: gradient SVD, variance of inputs (EVA), or of weight × input (CorDA)."
    )
    rows: int = setting(64, "Training rows on which auto scores ranks.")
    max_rank: int = setting(64, "Largest rank that auto gives a matrix.")
    prune_from: float = setting(0.15, "Share of the steps after which prune starts to cut.")
    prune_until: float = setting(0.5, "Share of the steps after which prune leaves the ranks unchanged.")
    prune_cuts: int = setting(4, "Number of cuts that prune makes between the two.")

    def __post_init__(self) -> None:
        require_types(self)

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        found: list[str] = []
        if self.rows < 2:
            found.append(f"ranks.rows is {self.rows}; it must be 2 or more: half of them check the scores of the other half.")
        if self.max_rank < 1:
            found.append(f"ranks.max_rank is {self.max_rank}; it must be 1 or more.")
        if self.budget is not None:
            try:
                parameter_count(self.budget, "ranks.budget")
            except ConfigError as error:
                found.append(str(error))
            if self.choose == "given":
                which = "Add --ranks auto, or --ranks prune"
                found.append(f"ranks.budget is {self.budget}, but ranks.choose is given, which uses none. {which}.")
        if not 0 <= self.prune_from < self.prune_until <= 1:
            found.append(
                f"ranks.prune_from is {self.prune_from:g} and ranks.prune_until is {self.prune_until:g}; expected shares of the "
                "steps from 0 to 1, the first below the second."
            )
        if self.prune_cuts < 1:
            found.append(f"ranks.prune_cuts is {self.prune_cuts}; it must be 1 or more.")
        return found


def parameter_count(text: str, name: str) -> int:
    """Parses a number of parameters such as "1.5M", "500k" or "2000000". Raises ConfigError that names the setting `name`."""
    match = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    count = round(float(match[1]) * _UNITS[match[2].lower()]) if match and math.isfinite(float(match[1])) else 0
    if count < 1:
        raise ConfigError(f"{name} is {text!r}; expected a number of parameters such as 500k, 1.5M or 2000000.")
    return count

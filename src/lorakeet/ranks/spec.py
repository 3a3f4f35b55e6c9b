"""How ranks are chosen: `RanksSpec`, the `ranks:` part of a run file. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from lorakeet.errors import ConfigError

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_COUNT = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmb]?)", re.IGNORECASE)


@dataclass(frozen=True)
class RanksSpec:
    """Whether ranks are given, spent where some training rows say that they are worth most, or cut in training."""

    choose: Literal["given", "auto", "prune"] = field(
        default="given",
        metadata={
            "help": "given: lora.rank and lora.rank_pattern; auto: a budget is spent where it helps most; prune: "
            "the given ranks are cut in training."
        },
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Parameters of all pairs, such as 1.5M: under auto, or in the end under prune; left out, as lora.rank "
            "takes, or two thirds of them."
        },
    )
    score: Literal["gradient", "activation", "sensitivity"] = field(
        default="gradient",
        metadata={"help": "What a rank is worth: gradient SVD, variance of inputs (EVA), or of weight × input (CorDA)."},
    )
    rows: int = field(default=64, metadata={"help": "Training rows on which auto measures what ranks are worth."})
    max_rank: int = field(default=64, metadata={"help": "Highest rank that auto gives a matrix."})
    prune_from: float = field(default=0.15, metadata={"help": "Share of the steps after which prune lets the budget fall."})
    prune_until: float = field(default=0.5, metadata={"help": "Share of the steps after which ranks stay as prune left them."})
    prune_cuts: int = field(default=4, metadata={"help": "How often prune cuts the pairs between these two."})

    def validate(self) -> list[str]:
        """Every problem of these settings in words; empty when they can be used."""
        found: list[str] = []
        if self.rows < 2:
            found.append(f"ranks.rows is {self.rows}; it must be 2 or more: one half of them checks what the other half finds.")
        if self.max_rank < 1:
            found.append(f"ranks.max_rank is {self.max_rank}; it must be 1 or more.")
        if self.budget is not None:
            try:
                parameter_count(self.budget, "ranks.budget")
            except ConfigError as error:
                found.append(str(error))
            if self.choose == "given":
                which = "Add --ranks auto, or --ranks prune"
                found.append(f"ranks.budget is {self.budget}, but ranks.choose is given, which spends none. {which}.")
        if not 0 <= self.prune_from < self.prune_until <= 1:
            found.append(
                f"ranks.prune_from is {self.prune_from:g} and ranks.prune_until is {self.prune_until:g}; expected shares of the "
                "steps from 0 to 1, the first below the second."
            )
        if self.prune_cuts < 1:
            found.append(f"ranks.prune_cuts is {self.prune_cuts}; it must be 1 or more.")
        return found


def parameter_count(text: str, name: str) -> int:
    """The number of parameters that a person means by "1.5M", "500k" or "2000000". Raises ConfigError, which calls it `name`."""
    match = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    count = round(float(match[1]) * _UNITS[match[2].lower()]) if match and math.isfinite(float(match[1])) else 0
    if count < 1:
        raise ConfigError(f"{name} is {text!r}; expected a number of parameters such as 500k, 1.5M or 2000000.")
    return count

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
    """Whether ranks are given, or spent where some training rows say that they are worth most."""

    choose: Literal["given", "auto"] = field(
        default="given", metadata={"help": "given: lora.rank and lora.rank_pattern; auto: a budget is spent where it helps most."}
    )
    budget: str | None = field(
        default=None, metadata={"help": "Parameters of all pairs under auto, such as 1.5M; left out, as many as lora.rank takes."}
    )
    score: Literal["gradient", "activation", "sensitivity"] = field(
        default="gradient",
        metadata={"help": "What a rank is worth: gradient SVD, variance of inputs (EVA), or of weight × input (CorDA)."},
    )
    rows: int = field(default=64, metadata={"help": "Training rows on which auto measures what ranks are worth."})
    max_rank: int = field(default=64, metadata={"help": "Highest rank that auto gives a matrix."})

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
                found.append(f"ranks.budget is {self.budget}, but ranks.choose is given, which spends none. Add --ranks auto.")
        return found


def parameter_count(text: str, name: str) -> int:
    """The number of parameters that a person means by "1.5M", "500k" or "2000000". Raises ConfigError, which calls it `name`."""
    match = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    count = round(float(match[1]) * _UNITS[match[2].lower()]) if match and math.isfinite(float(match[1])) else 0
    if count < 1:
        raise ConfigError(f"{name} is {text!r}; expected a number of parameters such as 500k, 1.5M or 2000000.")
    return count

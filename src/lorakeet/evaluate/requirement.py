"""Requirements on a measured value, such as ">=0.75 at low": the end of its interval that is worse for it decides."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from lorakeet.errors import ConfigError
from lorakeet.evaluate.intervals import Estimate

_FORM = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(?:at\s+(low|value|high))?\s*")
End = Literal["low", "value", "high"]


@dataclass(frozen=True)
class Requirement:
    """A bound on one end of a value's interval."""

    sign: str
    bound: float
    end: End

    def holds(self, estimate: Estimate) -> bool:
        """True if that end of the interval is on the right side of the bound; never for a value that is no number."""
        found = float(getattr(estimate, self.end))
        if self.sign in (">=", "<="):
            return found >= self.bound if self.sign == ">=" else found <= self.bound
        return found > self.bound if self.sign == ">" else found < self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g} at {self.end}"


def parse_requirement(text: str, what: str) -> Requirement:
    """A requirement from text; without an end it is the worse one: low for "more than", high for "less than".

    `what` names the setting in the ConfigError for other texts.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ConfigError(f"{what} is {text!r}; expected a bound such as '>=0.75', '<=2' or '>=0.75 at value'.")
    sign, bound, end = found.groups()
    return Requirement(sign, float(bound), cast(End, end or ("low" if sign[0] == ">" else "high")))

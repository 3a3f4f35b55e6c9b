"""`PreferenceSpec`, the `preference` part of a run file, and what the kind adds to `train`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

from lorakeet.registry import START, Objective
from lorakeet.setting import setting
from lorakeet.settings import require_types

OBJECTIVES = ("dpo", "ipo", "cdpo", "kto", "orpo", "simpo")
KTO = "kto"
WITHOUT_REFERENCE = ("orpo", "simpo")
RATE_FACTOR = 0.1  # of the default rate of sft

# The defaults of each objective's paper, or of TRL where the paper leaves them open.
_BETA = {"dpo": 0.1, "ipo": 0.1, "cdpo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
_SMOOTHING = {"cdpo": 0.1}
_MARGIN = {"simpo": 1.0}
_NORMALISED = ("ipo", "orpo", "simpo")
_SFT_WEIGHT = {"orpo": 1.0}


def needs_reference(objective: str) -> bool:
    """Whether the loss compares with a reference."""
    return objective in OBJECTIVES and objective not in WITHOUT_REFERENCE


def reference_of(train: Any) -> str:
    """What a run with these settings of training is compared with; empty for nothing."""
    return str(train.reference) if needs_reference(train.objective) else ""


def declared_objective(name: str) -> Objective:
    """An objective of this kind, as the trainer needs it. For kto the second answer of a row is that of another row."""
    titles = "One training row, with its chosen answer", "and with its rejected answer"
    return Objective(
        name=name, answers=2, nats=False, rate_factor=RATE_FACTOR, compared_with=reference_of, varied="preference.beta",
        shapes=("rated",) if name == KTO else ("preference",), rows="lorakeet.kinds.preference.rows:rows_for",
        only_read=int(name == KTO),
        titles=("One training row", "the same prompt with another row's answer") if name == KTO else titles,
    )  # fmt: skip


@dataclass(frozen=True)
class ReferenceSpec:
    """What preferences add to the settings of training."""

    reference: str = setting(
        START, "Model that dpo, ipo, cdpo and kto compare with: start (as training starts), base, or a run or adapter folder."
    )


@dataclass(frozen=True)
class PreferenceSpec:
    """The loss of train.objective dpo, ipo, cdpo, kto, orpo or simpo; a value left out is the objective's own."""

    beta: float | None = setting(
        None, "Strength of the preference (default: 0.1, simpo 2). Higher stays nearer to the reference; τ of ipo, λ of orpo."
    )
    label_smoothing: float | None = setting(
        None, "Share of pairs whose answers are taken to be swapped (cdpo: default 0.1; also for simpo), below 0.5."
    )
    margin: float | None = setting(None, "The γ of simpo: by how much the chosen answer must lead (default 1).")
    length_normalised: bool | None = setting(
        None, "Divide log-probabilities by the answer's tokens. Always so for ipo, orpo and simpo; default for the others: no."
    )
    sft_weight: float | None = setting(
        None, "Weight of the chosen answer's loss in nats a token, added to the preference loss (default: 0, orpo 1)."
    )
    desirable_weight: float = setting(1.0, "Weight of a row whose answer is wanted, for kto.")
    undesirable_weight: float = setting(1.0, "Weight of a row whose answer is not wanted, for kto.")

    def __post_init__(self) -> None:
        require_types(self)

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        found = []
        for name, zero in (("beta", False), ("margin", True), ("sft_weight", True), ("desirable_weight", False),
                           ("undesirable_weight", False)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
                found.append(f"preference.{name} is {value:g}; expected {'0 or more' if zero else 'above 0'}.")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 0.5:
            found.append(f"preference.label_smoothing is {self.label_smoothing:g}; expected 0 or more and below 0.5.")
        return found

    def conflicts(self, objective: str) -> list[str]:
        """Returns a message for every setting that `objective` does not have."""
        if objective not in OBJECTIVES:
            changed = [name for name, value in vars(self).items() if value != getattr(PreferenceSpec(), name)]
            advice = f"but train.objective is {objective}. Set train.objective, or leave it out."
            return [f"preference.{name} is set, {advice}" for name in changed]
        found = []
        if self.label_smoothing and objective not in ("cdpo", "simpo"):
            more = " Take cdpo, which is dpo with label smoothing." if objective == "dpo" else " Leave it out."
            found.append(f"preference.label_smoothing is {self.label_smoothing:g}, but train.objective is {objective}.{more}")
        if self.margin is not None and objective != "simpo":
            found.append(f"preference.margin is {self.margin:g}, but train.objective is {objective}, not simpo. Leave it out.")
        if self.length_normalised is False and objective in _NORMALISED:
            found.append(f"preference.length_normalised is false, but {objective} divides by the length. Leave it out.")
        if self.length_normalised and objective == KTO:
            found.append("preference.length_normalised is true, which kto does not have. Leave it out.")
        if self.sft_weight and objective == KTO:
            found.append(f"preference.sft_weight is {self.sft_weight:g}, but kto has no chosen answer. Leave it out.")
        if objective != KTO and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            found.append(f"preference.desirable_weight and undesirable_weight are for kto, but train.objective is {objective}.")
        return found

    def resolved(self, objective: str) -> PreferenceSpec:
        """The settings with every value of `objective` filled in."""
        return replace(
            self,
            beta=_BETA[objective] if self.beta is None else self.beta,
            label_smoothing=_SMOOTHING.get(objective, 0.0) if self.label_smoothing is None else self.label_smoothing,
            margin=_MARGIN.get(objective, 0.0) if self.margin is None else self.margin,
            length_normalised=objective in _NORMALISED if self.length_normalised is None else self.length_normalised,
            sft_weight=_SFT_WEIGHT.get(objective, 0.0) if self.sft_weight is None else self.sft_weight,
        )


def preference_of(config: Any) -> PreferenceSpec:
    """The part `preference` of a RunConfig, with every value of its objective filled in."""
    return cast(PreferenceSpec, config.section(PreferenceSpec)).resolved(config.train.objective)

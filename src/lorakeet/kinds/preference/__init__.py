"""Runs on preferences: which of two answers a model prefers, or whether one is wanted. A kind over text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakeet.core.spec import MEASURED
from lorakeet.kinds.text import DECLARATION as TEXT
from lorakeet.registry import Section
from lorakeet.train.preference_spec import OBJECTIVES, SFT, START, PreferenceSpec, needs_reference


def _conflicts(config: Any) -> list[str]:
    objective = config.train.objective
    found = list(config.section(PreferenceSpec).conflicts(objective))
    if objective not in DECLARATION.objectives:
        return found
    if not needs_reference(objective) and config.train.reference != START:
        found.append(
            f"train.reference is {config.train.reference}, but train.objective {objective} compares with no reference. Leave "
            "it out, or take dpo, ipo, cdpo or kto."
        )
    if config.kind != "text":
        found.append(f"train.objective is {objective}, which needs text, but kind is {config.kind}. Take sft, or kind: text.")
    if config.data.supervise == "all":
        found.append(f"data.supervise is all, but {objective} compares answers alone. Leave it out.")
    if config.lora.start in MEASURED or config.ranks.choose == "auto":
        what = f"lora.start {config.lora.start}" if config.lora.start in MEASURED else "ranks.choose auto"
        found.append(f"{what} measures gradients of the sft loss; train.objective is {objective}. Take kaiming and given.")
    return found


DECLARATION = replace(
    TEXT,
    name="preference",
    help="a causal language model, on preferences",
    module="lorakeet.kinds.preference.kind",
    over=TEXT.name,
    objectives=tuple(objective for objective in OBJECTIVES if objective != SFT),
    sections={"preference": Section(PreferenceSpec, "The loss of a preference objective.")},
    conflicts=_conflicts,
)

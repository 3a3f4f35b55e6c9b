"""Runs on preferences: which of two answers a model prefers, or whether one is wanted. A kind over text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakeet.core.spec import MEASURED
from lorakeet.kinds.preference.spec import OBJECTIVES, PreferenceSpec, ReferenceSpec, declared_objective, needs_reference
from lorakeet.kinds.preference.wording import METRICS, RIVALS
from lorakeet.kinds.text import DECLARATION as TEXT
from lorakeet.registry import BASE, START, Section


def _conflicts(config: Any) -> list[str]:
    objective, reference = config.train.objective, config.train.reference
    found = list(config.section(PreferenceSpec).conflicts(objective))
    if not reference.strip():
        found.append("train.reference is empty; expected start, base, or the folder of a run or an adapter.")
    if objective not in OBJECTIVES:
        said = f"train.reference is {reference}, but train.objective {objective} has no reference. Leave it out."
        return [*found, said] if reference not in (START, BASE) else found
    if not needs_reference(objective) and reference != START:
        found.append(
            f"train.reference is {reference}, but train.objective {objective} compares with no reference. Leave "
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
    objectives=tuple(map(declared_objective, OBJECTIVES)),
    trains="a preference between two (dpo, ipo, cdpo, orpo, simpo) or about one (kto)",
    train=ReferenceSpec,
    sections={"preference": Section(PreferenceSpec, "The loss of a preference objective.")},
    lacks={"compress": "A cut is compared by loss and replies, and this run by preferences. Train with a smaller lora.rank."},
    read_paths=("train.reference",),
    shapes={"preference": "lorakeet.kinds.preference.rows:PAIRED", "rated": "lorakeet.kinds.preference.rows:RATED_ROWS"},
    metrics=METRICS,
    rivals=RIVALS,
    trials="lorakeet.kinds.preference.trials:PairTrials",
    conflicts=_conflicts,
)

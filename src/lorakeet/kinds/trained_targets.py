"""The table of targets of a run: what is trained of each kind of module, what moved, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median_low
from typing import Any

from lorakeet.core.plan import ExtraEntry, ModelWeight, Plan, path_range
from lorakeet.evaluate.report.target_row import ExpertTokens, TargetRow
from lorakeet.memory.remembered import remembered
from lorakeet.models.files.validate import first_line
from lorakeet.models.module_kinds import EXPERT, ROUTER
from lorakeet.models.text.by_peft import peft_version, unread_by_peft

PAIR, WHOLE = "pair", "trained whole"
CHOSEN = ("in lora.exclude_modules", "not in lora.target_modules", "outside lora.layers")  # reasons that are the user's own
STAYED = "Trained, but did not move"
SHOWN = 8  # numbers of experts in a sentence


@dataclass(frozen=True)
class Moved:
    """Which trained tensors left their start, by name, each expert of a stack on its own; and the tokens of experts by block."""

    tensors: Mapping[str, tuple[bool, ...]]
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def left_start(self, path: str, factor: str = "B") -> tuple[bool, ...]:
        """Whether A or B of the pair at `path` moved; nothing for a pair that was cut to rank 0."""
        return self.tensors.get(f"{path}.{factor}", ())

    def whole_moved(self, path: str) -> bool:
        """Whether any number of the module that is trained whole at `path`, or of its new rows, moved."""
        return any(any(found) for name, found in self.tensors.items() if name.startswith(f"{path}."))


def target_rows(plan: Plan, moved: Moved | None = None) -> tuple[TargetRow, ...]:
    """A row for each kind of module of the model, in model order; none for a plan that does not know its model's weights.

    With `moved`, also what moved in training.
    """
    paired, groups = {entry.path for entry in plan.entries}, dict[str, list[tuple[ModelWeight, str]]]()
    for weight in plan.weights:
        whole = any(_within(weight.path, extra) for extra in plan.extras)
        state = PAIR if weight.path in paired else WHOLE if whole else weight.why_not or "cut to rank 0"
        groups.setdefault(weight.group, []).append((weight, state))
    return tuple(_row(group, found, moved) for group, found in groups.items())


def _row(group: str, found: list[tuple[ModelWeight, str]], moved: Moved | None) -> TargetRow:
    pairs = [weight for weight, state in found if state == PAIR]
    left: dict[str, int] = {}
    for _, state in found:
        if state not in (PAIR, WHOLE):
            left[state] = left.get(state, 0) + 1
    blocks = {weight.path.rpartition(".")[0]: weight.experts for weight in pairs if weight.experts}
    row = TargetRow(group, len(found), len(pairs), len(found) - len(pairs) - sum(left.values()), sum(blocks.values()), left)
    if moved is None:
        return row
    counts = sorted(count for block in blocks for count in moved.tokens.get(block, ()))
    tokens = None
    if counts:
        tokens = ExpertTokens(len(counts), counts.count(0), counts[0], median_low(counts), counts[-1])
    left_start = {factor: sum(any(moved.left_start(weight.path, factor)) for weight in pairs) for factor in "AB"}
    return replace(row, moved=left_start["B"], moved_a=left_start["A"], tokens=tokens)


def _within(path: str, extra: ExtraEntry) -> bool:
    return any(place and (path == place or path.startswith(f"{place}.")) for place in (extra.path, extra.tied))


def remarks_before(plan: Plan) -> Iterator[str]:
    """Sentences on what a reader of the settings would not expect: experts without pairs, and pairs on routers."""
    for row in target_rows(plan):
        unexpected = [why for why in row.left if not why.startswith(CHOSEN)]
        if row.kind == EXPERT and not row.pairs and unexpected:
            yield f"The experts get no pair and stay as they are: {'; '.join(unexpected)}."
        if row.kind == ROUTER and row.pairs:
            yield f"{row.pairs:,} router tensors get a pair, so that training changes which experts a token goes to."


def remarks_of_peft(config: Any, plan: Plan, owner: Any = None) -> Iterator[str]:
    """A sentence where the installed PEFT will not read what `plan` trains on a model of this transformers configuration."""
    installed = peft_version()
    try:
        places = [(entry.path, entry.kind, entry.variant) for entry in plan.entries]  # the ranks change none

        def parts() -> tuple[object, ...]:
            return "PEFT", installed, config.to_json_string(use_diff=False), owner, places

        why = remembered(parts, partial(unread_by_peft, config, plan, owner)) if installed else ""
    except ImportError as error:
        yield f"PEFT {installed} cannot be imported here ({first_line(error)}), so what it reads of the adapter is not known."
        return
    if why:
        yield f"PEFT {installed} will not read this adapter: {why}."


def stayed(plan: Plan, moved: Moved) -> tuple[str, ...]:
    """Names what is trained and stayed at its start, each with why where that is known; similar places of blocks share a line."""
    whole: dict[str, list[str]] = {}
    lines: list[str] = []
    for entry in plan.entries:
        tokens = moved.tokens.get(entry.path.rpartition(".")[0], ())
        found = moved.left_start(entry.path)[: len(tokens) or None]  # LongCat-Flash's last experts pass their tokens through
        if not found or all(found):
            continue
        if len(found) > 1:
            lines.append(_experts_line(entry.path, found, tokens))
        else:
            name = ".".join("#" if part.isdigit() else part for part in entry.path.split("."))
            whole.setdefault(name, []).append(entry.path)
    extras = [extra.path for extra in plan.extras if not moved.whole_moved(extra.path)]
    return (*map(path_range, whole.values()), *lines, *extras)


def _experts_line(path: str, found: Sequence[bool], tokens: Sequence[int]) -> str:
    still = [expert for expert, left in enumerate(found) if not left]
    names = ", ".join(map(str, still[:SHOWN])) + (f", … {len(still) - SHOWN} more" if len(still) > SHOWN else "")
    seen = sorted({tokens[expert] for expert in still}) if tokens else []
    saw = f", which saw {' to '.join(f'{count:,}' for count in dict.fromkeys((seen[0], seen[-1])))} tokens" if seen else ""
    return f"{path}: {len(still)} of {len(found)} experts ({names}){saw}"


def warnings_after(plan: Plan, moved: Moved) -> Iterator[str]:
    """A sentence for each trained part that stayed at its start."""
    for line in stayed(plan, moved):
        yield f"{STAYED}: {line}."

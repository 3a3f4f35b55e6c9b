"""`lorakeet verify --deploy`: whether the adapter will load in a program, by its features; nothing is compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from lorakeet.config import read_run
from lorakeet.errors import VerificationFailed
from lorakeet.exporting.runtime_support import Feature, Limit, Runtime, features_of_adapter, features_of_plan, has_head, limits_of
from lorakeet.formats.detect import read_certified
from lorakeet.kinds.protocol import run_kind
from lorakeet.kinds.text.pairs_on_shapes import ties_head
from lorakeet.kinds.text.stacked import with_earlier
from lorakeet.models.text.from_config import config_of
from lorakeet.planning.fit import Say
from lorakeet.runs.open_adapter import open_adapter


@dataclass(frozen=True)
class Deployable:
    """Nothing stands in the way; `notes` are what the runtime needs."""

    exit_code: ClassVar[int] = 0
    runtime: str
    features: tuple[str, ...]
    notes: tuple[Limit, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        notes = [{"feature": limit.feature, "what": limit.what, "remedy": limit.remedy} for limit in self.notes]
        return {"runtime": self.runtime, "loads": True, "features": list(self.features), "notes": notes}


def check_deployment(
    config_or_run: Path, runtime: Runtime, console: Console, *, base: str | None = None, uncertified: bool = False
) -> Deployable:
    """What `runtime` will do with the adapter of a run file, a run or an adapter folder; `base` wins over the model named there.

    Raises VerificationFailed (exit code 3) listing every feature that it refuses or computes wrongly, with what helps.
    ConfigError where settings do not fit the model, or where its configuration is needed and cannot be had.
    """
    say, planned = partial(console.print, markup=False, soft_wrap=True), config_or_run.is_file()
    features = _planned(config_or_run, base, say) if planned else _finished(config_or_run, base, runtime, say, uncertified)
    limits = limits_of(runtime, features)
    bad = [limit for limit in limits if limit.effect != "note"]
    if bad:
        what = "would not load" if planned else "does not load"
        lines = [f"The adapter of {config_or_run} {what} rightly in {runtime}:"]
        words = {"refused": "is refused", "wrong": "is computed wrongly, without a word"}
        lines += [f"  - {limit.feature} {words[limit.effect]}: {limit.what} ({limit.evidence}). {limit.remedy}" for limit in bad]
        raise VerificationFailed("\n".join(lines))
    for limit in limits:
        console.print(f"{runtime}: {limit.feature}: {limit.what}. {limit.remedy}", soft_wrap=True)
    listed = ", ".join(sorted(features)) or "plain pairs of one rank and scale"
    console.print(f"The adapter of {config_or_run} ({listed}) loads in {runtime}.", soft_wrap=True)
    return Deployable(runtime, tuple(sorted(features)), limits)


def _planned(run_file: Path, base: str | None, say: Say) -> frozenset[Feature]:
    """Of the plan that the run will have, made on the model's shapes alone."""
    config = with_earlier(read_run(run_file))
    if base is not None:
        config = config.changed(model={"path": base})
    first = max([config.lora.rank, *config.lora.rank_pattern.values()])
    auto = {"auto": config.ranks.max_rank, "prune": first}.get(config.ranks.choose, 0)
    plan, tied = run_kind(config).planned_pairs(config, say)
    return features_of_plan(plan, tied=tied, auto=auto)


def _finished(folder: Path, base: str | None, runtime: Runtime, say: Say, uncertified: bool) -> frozenset[Feature]:
    """Of an adapter as it is; its base is read only if a pair is on the head and `runtime` minds a tied one."""
    adapter, _ = read_certified(folder, uncertified=uncertified, say=say)
    asks = has_head(adapter.pairs) and bool(limits_of(runtime, ("tied head pairs",)))
    if not asks:
        return features_of_adapter(adapter, tied=False)
    opened = open_adapter(folder, base=base, uncertified=True, say=lambda _: None)  # what is odd about it was said before
    return features_of_adapter(adapter, tied=ties_head(config_of(opened.config.model, say)))

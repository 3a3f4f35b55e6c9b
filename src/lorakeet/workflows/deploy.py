"""Will this adapter load where it is meant to run? Answered from its settings before training, or from a finished one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import read_run
from lorakeet.errors import VerificationFailed
from lorakeet.export.deployment import Limit, Runtime, features_of_adapter, features_of_spec, limits_of
from lorakeet.formats.detect import read_adapter


@dataclass(frozen=True)
class Deployable:
    """Nothing stands in the way; `notes` are what the runtime must be told."""

    runtime: str
    features: tuple[str, ...]
    notes: tuple[Limit, ...]

    @property
    def exit_code(self) -> int:
        return 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        notes = [{"feature": limit.feature, "what": limit.what, "remedy": limit.remedy} for limit in self.notes]
        return {"runtime": self.runtime, "loads": True, "features": list(self.features), "notes": notes}


def check_deployment(config_or_run: Path, runtime: Runtime, console: Console) -> Deployable:
    """What `runtime` will do with the adapter of a run file, a run or an adapter folder.

    Raises VerificationFailed (exit code 3) listing every feature that it refuses or computes wrongly, with what helps.
    """
    planned = config_or_run.is_file()
    features = features_of_spec(read_run(config_or_run).lora) if planned else features_of_adapter(read_adapter(config_or_run))
    limits = limits_of(runtime, features)
    bad = [limit for limit in limits if limit.effect != "note"]
    if bad:
        what = "would not load" if planned else "does not load"
        lines = [f"The adapter of {config_or_run} {what} rightly in {runtime}:"]
        words = {"refused": "is refused", "wrong": "is computed wrongly, without a word"}
        lines += [f"  - {limit.feature} {words[limit.effect]}: {limit.what} ({limit.source}). {limit.remedy}" for limit in bad]
        raise VerificationFailed("\n".join(lines))
    for limit in limits:
        console.print(f"{runtime}: {limit.feature}: {limit.what}. {limit.remedy}", soft_wrap=True)
    listed = ", ".join(sorted(features)) or "plain pairs of one rank and scale"
    console.print(f"The adapter of {config_or_run} ({listed}) loads in {runtime}.", soft_wrap=True)
    return Deployable(runtime, tuple(sorted(features)), limits)

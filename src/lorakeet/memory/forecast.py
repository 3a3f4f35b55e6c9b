"""Forecasts the memory of each phase of a run, by kind: a ledger's peaks and what the process needs beside its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lorakeet.memory.allocator import slack
from lorakeet.memory.usage import Usage

KINDS = ("runtime", "base", "adapter", "moments", "gradients", "saved activations", "logits", "scratch", "allocator")


@dataclass(frozen=True)
class Phase:
    """One phase at its peak: bytes by kind. `runtime` is Python and its libraries, `allocator` the allocator's overhead."""

    name: str
    kinds: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.kinds.values())

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"phase": self.name, "bytes": self.bytes, "kinds": dict(self.kinds)}


@dataclass(frozen=True)
class Forecast:
    """The phases of a run, in order."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase with the most bytes."""
        return max(self.phases, key=lambda phase: phase.bytes)

    def phase(self, name: str) -> Phase:
        """Returns the phase of that name; KeyError if there is none."""
        return {phase.name: phase for phase in self.phases}[name]


def phases_of(
    peaks: Mapping[str, Usage], runtime: int, *, returning: bool = False, trimmed_before: Collection[str] = ()
) -> tuple[Phase, ...]:
    """Returns the phases at the `peaks` of a ledger, in a process that uses `runtime` bytes beside its tensors.

    With `returning`, freed memory returns to the system at once. Otherwise the heap keeps its largest size
    (memory/allocator) through later phases, but is trimmed before those in `trimmed_before`.
    """
    found, heap = [], 0
    for name, peak in peaks.items():
        heap = 0 if name in trimmed_before else heap
        heap = 0 if returning else max(heap, peak.heap + slack(peak.heap))
        beside = slack(0) if returning else heap - peak.heap
        found.append(phase_at(name, peak, runtime, beside))
    return tuple(found)


def phase_at(name: str, peak: Usage, runtime: int, allocator: int) -> Phase:
    """Returns the phase at its `peak`, with `runtime` and `allocator` bytes beside the tensors."""
    kinds = {**peak.kinds, "runtime": runtime + peak.kinds.get("runtime", 0), "allocator": allocator}
    return Phase(name, {kind: kinds[kind] for kind in KINDS if kinds.get(kind)})

"""What each phase of a run will hold, by kind: the numbers of a ledger with what the process holds beside its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lorakeet.memory.allocator import slack
from lorakeet.memory.usage import Usage

KINDS = ("runtime", "base", "adapter", "moments", "gradients", "saved activations", "logits", "scratch", "allocator")


@dataclass(frozen=True)
class Phase:
    """One phase at its peak: bytes by kind. `runtime` is Python and its libraries, `allocator` what stays of freed tensors."""

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
    """The phases of a run in their order."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    def phase(self, name: str) -> Phase:
        """The phase of that name; KeyError where there is none."""
        return {phase.name: phase for phase in self.phases}[name]


def phases_of(
    held: Mapping[str, Usage], runtime: int, *, returning: bool = False, trimmed_before: Collection[str] = ()
) -> tuple[Phase, ...]:
    """The phases, in their order, at the peaks of a ledger, in a process that holds `runtime` bytes beside its tensors.

    `returning`: freed memory goes back to the system at once. Where it does not, the heap stays as large as it ever was
    (memory/allocator), so that a phase may hold what an earlier one has freed; but not before the phases in `trimmed_before`.
    """
    found, heap = [], 0
    for name, peak in held.items():
        heap = 0 if name in trimmed_before else heap
        heap = 0 if returning else max(heap, peak.heap + slack(peak.heap))
        beside = slack(0) if returning else heap - peak.heap
        found.append(phase_at(name, peak, runtime, beside))
    return tuple(found)


def phase_at(name: str, peak: Usage, runtime: int, allocator: int) -> Phase:
    """The phase at its `peak`, with `runtime` bytes and those that an allocator keeps beside the tensors."""
    kinds = {**peak.kinds, "runtime": runtime + peak.kinds.get("runtime", 0), "allocator": allocator}
    return Phase(name, {kind: kinds[kind] for kind in KINDS if kinds.get(kind)})

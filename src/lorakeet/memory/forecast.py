"""Forecasts the memory of each phase of a run, by kind: a ledger's peaks and what the process needs beside its tensors.

The peaks of a model of many equal blocks come from runs with three and four of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.memory.allocator import slack
from lorakeet.memory.usage import NO_BLOCK, Usage, UsageSegment

KINDS = (
    "runtime", "base", "adapter", "moments", "gradients", "saved activations", "logits", "scratch", "allocator",
)  # fmt: skip


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


class UnevenRuns(Exception):
    """The two runs do not have the same moments, so that they cannot be extrapolated."""


def extrapolate_peaks(few: Sequence[UsageSegment], more: Sequence[UsageSegment], blocks: int, *, wanted: int) -> dict[str, Usage]:
    """Returns the peak of each phase with `wanted` blocks, from a run with `blocks` of them and one with `blocks` + 1.

    A run with n equal blocks has the same moments in the first block, in the last and between blocks, and the moments of inner
    blocks lie evenly between those two. The memory in use at a moment m of a block at an end is affine in n,

        usage(m, n) = fixed(m) + n · a block's share(m)         share: its weights, saved activations, gradients …

    so two runs give the line, and the peak of n blocks is the largest of all lines at n. (The peak itself is not linear: with
    more blocks it may be at another moment.) Moments are matched by marks at each block's passes, and by their order.

    Raises UnevenRuns if the two do not run their blocks in the same way.
    """
    short, long = _by_mark(few), _by_mark(more)
    peaks: dict[str, Usage] = {}
    for (phase, event, block), ones in short.items():
        for number in _corresponding(block, blocks):
            others = long.get((phase, event, number), [])
            if len(ones) != len(others):
                raise UnevenRuns(f"{event} of block {block} in '{phase}': {len(ones)} and {len(others)} times")
            for one, other in zip(ones, others, strict=True):
                for usage in _extended(one, other, wanted - blocks):
                    if usage.bytes > peaks.get(phase, Usage()).bytes:
                        peaks[phase] = usage
    return peaks


def extrapolate_bytes(one: int, other: int, further: int) -> int:
    """Returns the size with `further` more blocks than `one` is for; `other` is for one more block."""
    return one + further * (other - one)


def _by_mark(segments: Iterable[UsageSegment]) -> Mapping[tuple[str, str, int], list[UsageSegment]]:
    found: dict[tuple[str, str, int], list[UsageSegment]] = defaultdict(list)
    for segment in segments:
        found[segment.phase, segment.event, segment.block].append(segment)
    return found


def _corresponding(block: int, blocks: int) -> tuple[int, ...]:
    """Returns the blocks of a run with one more that correspond to `block`: as far from the first one, from the last, or both."""
    if block in (NO_BLOCK, 0):
        return (block,)
    return (block + 1,) if block == blocks - 1 else (block, block + 1)


def _extended(one: UsageSegment, other: UsageSegment, further: int) -> Iterator[Usage]:
    """Yields the moments of a segment with `further` more blocks than in `one`."""
    if len(one.moments) == len(other.moments):
        for left, right in zip(one.moments, other.moments, strict=True):
            yield _extrapolated(left, left, right, further)
        return
    # A loop over all blocks: the largest of its start, end and peak bounds all of its moments.
    tops = [max(range(len(segment.moments)), key=lambda moment: segment.moments[moment].bytes) for segment in (one, other)]
    later, more = tops[1] - tops[0], len(other.moments) - len(one.moments)
    if later not in (0, more) and not 0 < later < more:  # before the loop, after it, or between two
        raise UnevenRuns(f"{one.event} of block {one.block} in '{one.phase}' has its peak at another moment with more blocks")
    peaks = one.moments[tops[0]], other.moments[tops[1]]
    for left, right in ((one.moments[0], other.moments[0]), (one.moments[-1], other.moments[-1]), peaks):
        yield _extrapolated(peaks[1], left, right, further - 1)


def _extrapolated(start: Usage, left: Usage, right: Usage, further: int) -> Usage:
    """Returns `start` and `further` times the difference of `right` and `left`."""
    kinds = {
        kind: start.kinds.get(kind, 0) + further * (right.kinds.get(kind, 0) - left.kinds.get(kind, 0))
        for kind in {**start.kinds, **left.kinds, **right.kinds}
    }
    kinds = {kind: size for kind, size in kinds.items() if size > 0}
    return Usage(sum(kinds.values()), kinds, max(0, start.heap + further * (right.heap - left.heap)))

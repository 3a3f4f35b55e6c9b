"""What a model of many equal blocks holds, from what three and four of them hold: every moment lies on a straight line.

Run with n equal blocks, a computation meets the same moments in the first block, in the last and between blocks, and those of
the blocks within are spread evenly between two ends. What a moment m of a block at an end holds is affine in n,

    held(m, n) = fixed(m) + n · a block's share(m)          share: its weights, what autograd saved of it, its gradients …

so two runs give the line, and the peak of n blocks is the largest of all lines at n. (A peak itself is no line: with more blocks
it may be another moment's.) Moments are told apart by marks at each block's forward and backward pass, and by their order after.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lorakeet.memory.usage import NO_BLOCK, Usage, UsageSegment


class UnevenRuns(Exception):
    """The runs do not meet the same moments, so that nothing follows from them for more blocks."""


def extrapolate_peaks(few: Sequence[UsageSegment], more: Sequence[UsageSegment], blocks: int, *, wanted: int) -> dict[str, Usage]:
    """The peak of each phase with `wanted` blocks, from a run with `blocks` of them and one with `blocks` + 1.

    Raises Uneven where the two do not go through their blocks alike.
    """
    short, long = _by_place(few), _by_place(more)
    peaks: dict[str, Usage] = {}
    for (phase, event, block), ones in short.items():
        for place in _places(block, blocks):
            others = long.get((phase, event, place), [])
            if len(ones) != len(others):
                raise UnevenRuns(f"{event} of block {block} in '{phase}': {len(ones)} and {len(others)} times")
            for one, other in zip(ones, others, strict=True):
                for held in _lines(one, other, wanted - blocks):
                    if held.bytes > peaks.get(phase, Usage()).bytes:
                        peaks[phase] = held
    return peaks


def extrapolate_bytes(one: int, other: int, further: int) -> int:
    """What is `one`, and with one block more `other`, with `further` blocks more."""
    return one + further * (other - one)


def _by_place(segments: Iterable[UsageSegment]) -> Mapping[tuple[str, str, int], list[UsageSegment]]:
    found: dict[tuple[str, str, int], list[UsageSegment]] = defaultdict(list)
    for segment in segments:
        found[segment.phase, segment.event, segment.block].append(segment)
    return found


def _places(block: int, blocks: int) -> tuple[int, ...]:
    """Where `block` of so many is in a run with one more: as far from the first, as far from the last, or both."""
    if block in (NO_BLOCK, 0):
        return (block,)
    return (block + 1,) if block == blocks - 1 else (block, block + 1)


def _lines(one: UsageSegment, other: UsageSegment, further: int) -> Iterator[Usage]:
    """The moments of a stretch, with `further` blocks more than in `one`."""
    if len(one.moments) == len(other.moments):
        for left, right in zip(one.moments, other.moments, strict=True):
            yield _on_line(left, left, right, further)
        return
    # A loop over all blocks: its moments lie between its ends and its peak, whichever of these rises most.
    places = [max(range(len(segment.moments)), key=lambda place: segment.moments[place].bytes) for segment in (one, other)]
    if places[0] != places[1] and len(one.moments) - places[0] != len(other.moments) - places[1]:
        raise UnevenRuns(f"{one.event} of block {one.block} in '{one.phase}' has its peak at another moment with more blocks")
    peaks = one.moments[places[0]], other.moments[places[1]]
    for left, right in ((one.moments[0], other.moments[0]), (one.moments[-1], other.moments[-1]), peaks):
        yield _on_line(peaks[1], left, right, further - 1)


def _on_line(start: Usage, left: Usage, right: Usage, further: int) -> Usage:
    """`start` and `further` times what `right` holds more than `left`."""
    kinds = {
        kind: start.kinds.get(kind, 0) + further * (right.kinds.get(kind, 0) - left.kinds.get(kind, 0))
        for kind in {**start.kinds, **left.kinds, **right.kinds}
    }
    kinds = {kind: size for kind, size in kinds.items() if size > 0}
    return Usage(sum(kinds.values()), kinds, max(0, start.heap + further * (right.heap - left.heap)))

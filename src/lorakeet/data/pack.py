"""Packed (varlen) batches: rows without padding; attention never crosses rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lorakeet.data.chat import Example, Ids
from lorakeet.kernels.host_copies import together_on


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows. `target_ids[i]` is predicted at `target_positions[i]`, the token before it."""

    ids: torch.Tensor  # (tokens,) int64
    lengths: tuple[int, ...]  # tokens of each row
    target_positions: torch.Tensor  # (targets,) int64
    target_ids: torch.Tensor  # (targets,) int64
    keys: tuple[str, ...]  # one per row
    numbers: tuple[Ids, Ids, Ids] | None = None  # ids, target positions and target ids on the host, where they are known there

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return len(self.target_ids)

    def padded_places(self) -> tuple[Ids, Ids]:
        """Where tokens lie among the rows padded on the right to the longest, end to end, on the host: each token (tokens,), and
        those that predict a target (targets,)."""
        longest = max(self.lengths)
        places = np.concatenate([np.arange(length) + number * longest for number, length in enumerate(self.lengths)])
        return places, places[self.on_host()[1]]

    @property
    def rows_of_tokens(self) -> torch.Tensor:
        """Row number of each token, (tokens,) int64; only tokens of the same row attend to each other."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        numbers = torch.arange(len(self.lengths), device=self.ids.device)
        return torch.repeat_interleave(numbers, lengths, output_size=sum(self.lengths))

    @property
    def target_rows(self) -> torch.Tensor:
        """Row number of each target, (targets,) int64."""
        return self.rows_of_tokens[self.target_positions]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on another device, to which they are copied at once."""
        numbers, tensors = self.numbers, (self.ids, self.target_positions, self.target_ids)
        if numbers is None and type(self.ids) is torch.Tensor and self.ids.device.type == "cpu":
            numbers = self.on_host()
        if self.ids.device.type == "cpu" and torch.device(device).type == "cuda" and numbers is not None:
            ids, positions, targets = together_on(numbers, torch.device(device))
        else:
            ids, positions, targets = (each.to(device) for each in tensors)
        return Batch(ids, self.lengths, positions, targets, self.keys, numbers)

    def cut(self, rows: Sequence[int]) -> list[Batch]:
        """Batches of so many consecutive rows each. Targets come row by row."""
        (ids, positions, targets), ends = self.on_host(), np.cumsum([0, *self.lengths])
        found = []
        for start, stop in pairwise(np.cumsum([0, *rows])):
            own = (positions >= ends[start]) & (positions < ends[stop])
            numbers = ids[ends[start] : ends[stop]], positions[own] - ends[start], targets[own]
            tokens, places, wanted = (torch.from_numpy(each).to(self.ids.device) for each in numbers)
            found.append(Batch(tokens, self.lengths[start:stop], places, wanted, self.keys[start:stop], numbers))
        return found

    def on_host(self) -> tuple[Ids, Ids, Ids]:
        """Ids, target positions and target ids on the host. Where they are known on a device alone, the host waits for it."""
        if self.numbers is not None:
            return self.numbers
        ids, positions, targets = (each.cpu().numpy() for each in (self.ids, self.target_positions, self.target_ids))
        return ids, positions, targets


def pack_examples(examples: Sequence[Example]) -> Batch:
    """Packs the examples in order. Raises ValueError for none, or if a first token is a target."""
    if not examples:
        raise ValueError("pack_examples() needs at least one example")
    positions, targets = [], []
    start = 0
    for example in examples:
        supervised = np.flatnonzero(example.supervised)
        if supervised.size and supervised[0] == 0:
            raise ValueError(f"the first token of row {example.key} is a target, and no token before it can predict it")
        positions.append(supervised + start - 1)
        targets.append(example.ids[supervised])
        start += len(example.ids)
    numbers = np.concatenate([example.ids for example in examples]), np.concatenate(positions), np.concatenate(targets)
    ids, places, wanted = (torch.from_numpy(each) for each in numbers)
    lengths, keys = tuple(len(example.ids) for example in examples), tuple(example.key for example in examples)
    return Batch(ids, lengths, places, wanted, keys, numbers)


def micro_batches(examples: Sequence[Example], max_tokens: int, *, padded: bool = False) -> list[Batch]:
    """Splits the examples of one step into batches of at most `max_tokens` tokens; a longer row is a batch of its own.

    As few batches as first-fit decreasing needs, of about the same size, since the largest one sets the memory of a step. Where
    rows are `padded` to the longest of their batch, its padding counts. Deterministic.
    """
    lengths = [len(example.ids) for example in examples]
    bins = padded_bins(lengths, max_tokens) if padded else even_bins(lengths, max_tokens)
    return [pack_examples([examples[number] for number in sorted(chosen)]) for chosen in bins]


def padded_bins(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Bins of indices of `lengths`, longest first, each of at most `most` once all in it are as long as its longest."""
    bins: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= most:
            bins[-1].append(number)
        else:
            bins.append([number])
    return bins


def even_bins(lengths: Sequence[int], most: int, grain: int = 0) -> list[list[int]]:
    """Bins of indices of `lengths`, each of at most `most`: as few as first-fit decreasing needs, and of even size.

    Sizes are evened out to within `grain`. A longer length gets a bin of its own."""
    bins = _first_fit(lengths, most)
    low, high = max(lengths, default=0), most  # invariant: `high` needs no more bins than `most`
    while high - low > grain and len(lengths) <= _FEW:
        middle = (low + high) // 2
        tighter = _first_fit(lengths, middle)
        if len(tighter) <= len(bins):
            bins, high = tighter, middle
        else:
            low = middle + 1
    return bins


_FEW = 512  # most rows for which even bins are searched: first-fit is quadratic


def _first_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """First-fit decreasing: longest first, ties in order, each into the first bin of at most `most` where it fits."""
    bins: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        found = next((index for index, left in enumerate(free) if lengths[number] <= left), None)
        if found is None:
            bins.append([number])
            free.append(most - lengths[number])
        else:
            bins[found].append(number)
            free[found] -= lengths[number]
    return bins

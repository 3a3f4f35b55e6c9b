"""Rows of tokens laid end to end: no padding, and attention never crosses from one row to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorakeet.data.chat import Example


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows laid end to end. `target_ids[i]` is to be predicted at `target_positions[i]`, the token before it."""

    ids: torch.Tensor  # (tokens,) int64
    lengths: tuple[int, ...]  # tokens of each row
    target_positions: torch.Tensor  # (targets,) int64
    target_ids: torch.Tensor  # (targets,) int64
    keys: tuple[str, ...]  # one per row

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens that the loss sees."""
        return len(self.target_ids)

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token in its own row, (tokens,) int64: what rotary embeddings get."""
        return torch.cat([torch.arange(length, device=self.ids.device) for length in self.lengths])

    @property
    def rows_of_tokens(self) -> torch.Tensor:
        """Number of the row of each token, (tokens,) int64: equal numbers may attend to each other."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        numbers = torch.arange(len(self.lengths), device=self.ids.device)
        return torch.repeat_interleave(numbers, lengths, output_size=sum(self.lengths))

    @property
    def target_rows(self) -> torch.Tensor:
        """Number of the row of each target, (targets,) int64."""
        return self.rows_of_tokens[self.target_positions]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on another device."""
        ids, places, targets = (to_device(each, device) for each in (self.ids, self.target_positions, self.target_ids))
        return Batch(ids, self.lengths, places, targets, self.keys)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. From the host to a CUDA card it goes by memory that the card reads by itself: the host does not wait
    until the card has computed what was asked of it before."""
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pack_examples(examples: Sequence[Example]) -> Batch:
    """One batch of the examples, in their order; ValueError without any, or where a first token is a target."""
    if not examples:
        raise ValueError("pack() needs at least one example")
    positions, targets = [], []
    start = 0
    for example in examples:
        supervised = np.flatnonzero(example.supervised)
        if supervised.size and supervised[0] == 0:
            raise ValueError(f"the first token of row {example.key} is a target, and no token stands before it to predict it")
        positions.append(supervised + start - 1)
        targets.append(example.ids[supervised])
        start += len(example.ids)
    return Batch(
        ids=torch.from_numpy(np.concatenate([example.ids for example in examples])),
        lengths=tuple(len(example.ids) for example in examples),
        target_positions=torch.from_numpy(np.concatenate(positions)),
        target_ids=torch.from_numpy(np.concatenate(targets)),
        keys=tuple(example.key for example in examples),
    )


def micro_batches(examples: Sequence[Example], max_tokens: int) -> list[Batch]:
    """The examples of one step in batches of at most `max_tokens` tokens each; a longer row stands alone.

    As few batches as first-fit decreasing needs, and of about the same size: the largest one decides how much memory a step
    takes. The same batches for the same examples.
    """
    bins = even_bins([len(example.ids) for example in examples], max_tokens)
    return [pack_examples([examples[number] for number in sorted(chosen)]) for chosen in bins]


def even_bins(lengths: Sequence[int], most: int, grain: int = 0) -> list[list[int]]:
    """The numbers of the lengths in as few bins of at most `most` as first-fit decreasing needs, of the same size but for `grain`
    and what first-fit leaves; a longer one by itself."""
    bins = _first_fit(lengths, most)
    low, high = max(lengths, default=0), most  # the bins are as few at `high`
    while high - low > grain and len(lengths) <= _FEW:
        middle = (low + high) // 2
        tighter = _first_fit(lengths, middle)
        if len(tighter) <= len(bins):
            bins, high = tighter, middle
        else:
            low = middle + 1
    return bins


_FEW = 512  # rows up to which even bins are searched for: first-fit takes time with the square of their number


def _first_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of the lengths in bins of at most `most`: longest first, equal ones in order, each into the first that fits."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = next((index for index, room in enumerate(rooms) if lengths[number] <= room), None)
        if place is None:
            bins.append([number])
            rooms.append(most - lengths[number])
        else:
            bins[place].append(number)
            rooms[place] -= lengths[number]
    return bins

"""A table whose rows are given out in spans, by whoever owns them: copies of unequal size side by side, none filled up."""

from __future__ import annotations

from collections.abc import Collection

import torch


class RowTable:
    """`numbers` (rows, width), and the `spans` of rows that owners have. A new table, with no row, is grown by `remake`."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spans: dict[int, slice] = {}
        self.numbers = _rows(0, width, dtype, device)

    def take(self, owner: int, count: int) -> bool:
        """Whether there is a span of `count` rows between those of others, which `owner` has from now on, or had already."""
        held = self.spans.get(owner)
        if held is not None:
            return bool(held.stop - held.start == count)
        first = 0
        if count:
            for span in sorted(self.spans.values(), key=lambda span: span.start):
                if span.start - first >= count:
                    break
                first = max(first, span.stop)
        if first + count > len(self.numbers):
            return False
        self.spans[owner] = slice(first, first + count)
        return True

    def free(self, owner: int) -> None:
        """The owner's rows, if any, can be given to others."""
        self.spans.pop(owner, None)

    def remake(self, rows: int, keep: Collection[int]) -> None:
        """A table of `rows` rows: first those of the owners in `keep`, one below the other; nobody else has any."""
        numbers = _rows(rows, self.numbers.shape[1], self.numbers.dtype, self.numbers.device)
        spans: dict[int, slice] = {}
        first = 0
        for owner in keep:
            held = self.spans[owner]
            spans[owner] = slice(first, first + held.stop - held.start)
            numbers[spans[owner]].copy_(self.numbers[held])
            first = spans[owner].stop
        self.numbers, self.spans = numbers, spans


def _rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # else nobody could copy to them outside of it
        return torch.empty(rows, width, dtype=dtype, device=device)

"""A table whose rows are allocated in spans of unequal size, without padding."""

from __future__ import annotations

from collections.abc import Collection

import torch


class RowTable:
    """`numbers` (rows, width), and the `spans` of rows by owner. A new table has no rows; `remake` grows it."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spans: dict[int, slice] = {}
        self.numbers = _rows(0, width, dtype, device)

    def take(self, owner: int, count: int) -> bool:
        """Allocates `count` rows to `owner`, unless it has them already; False if there is no such gap."""
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
        """Frees the owner's rows, if any."""
        self.spans.pop(owner, None)

    def remake(self, rows: int, keep: Collection[int]) -> None:
        """Makes a table of `rows` rows: first those of the owners in `keep`, in order; other owners lose theirs."""
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
    with torch.inference_mode(False):  # else they could not be written outside of inference mode
        return torch.empty(rows, width, dtype=dtype, device=device)

"""The shapes of micro-batches: few enough that what is made for each (models/text/cuda_graphs) serves many micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakeet.models.text.model import COUNTS, WHOLE, padded_count


@dataclass(frozen=True)
class BatchShape:
    """What micro-batches have in common that are replayed by one recording."""

    tokens: int  # filler included
    rows: int  # places for them, with those of filler; some may have no token
    longest: int  # row that may be among them

    @classmethod
    def of(cls, lengths: Sequence[int], longest: int) -> BatchShape:
        """That of rows of so many tokens, none of them more than `longest`."""
        tokens = padded_count(sum(lengths), few_counts=True)
        return cls(tokens, _power_of_two(len(lengths) + -(-(tokens - sum(lengths)) // longest)), longest)

    @classmethod
    def largest(cls, longest: int, micro_tokens: int, rows: int) -> BatchShape:
        """One that has room for any micro-batch of at most `rows` rows and `micro_tokens` tokens, or of one longer row."""
        tokens = padded_count(max(longest, micro_tokens), few_counts=True)
        return cls(tokens, _power_of_two(rows + -(-max(WHOLE, tokens // COUNTS) // longest)), longest)

    def rows_of(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of each place: the rows, filler cut into rows that are not too long, and nothing."""
        whole, rest = divmod(self.tokens - sum(lengths), self.longest)
        return [*lengths, *[self.longest] * whole, rest, *[0] * self.rows][: self.rows]

    def unlike(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of each place, as other rows may have them than those of `lengths`; the same where no others fit."""
        each, more = divmod(self.tokens, self.rows)
        even = [each + (number < more) for number in range(self.rows)]
        return even if even != self.rows_of(lengths) else self.rows_of(())[::-1]


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()

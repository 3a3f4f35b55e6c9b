"""Rows of the table of targets: for each kind of module how many tensors were trained, how many moved, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExpertTokens:
    """How many tokens of the training each expert of the adapted blocks saw; an expert of every block counts."""

    experts: int
    unseen: int
    least: int
    median: int
    most: int

    def __str__(self) -> str:
        seen = f"{self.experts - self.unseen:,} of {self.experts:,} experts saw tokens"
        return f"{seen}: {self.least:,} to {self.most:,} each, median {self.median:,}"


@dataclass(frozen=True)
class TargetRow:
    """One kind of module. Counts are of tensors; a tensor that two modules share counts in both."""

    kind: str
    tensors: int
    pairs: int = 0
    whole: int = 0  # trained whole, or with rows of new tokens
    experts: int = 0  # that are stacked in its tensors, of every block
    left: dict[str, int] = field(default_factory=dict)  # tensors without a pair, by the reason
    moved: int | None = None  # pairs whose B left its start, None before training; those trained whole count as one each
    moved_a: int | None = None  # pairs whose A left its start
    tokens: ExpertTokens | None = None

    @property
    def remarks(self) -> str:
        """What is to be said of the row: what is trained in another way, what was left out and why, and the experts' tokens."""
        said = [f"{self.whole:,} trained whole"] if self.whole else []
        said += [why if count == self.tensors else f"{count:,}: {why}" for why, count in self.left.items()]
        if self.tokens is not None:
            said.append(str(self.tokens))
        elif self.experts and self.pairs:
            said.append(f"{self.experts:,} experts")
        if self.moved is not None and self.moved_a not in (None, self.moved) and self.pairs:
            said.append(f"A of {self.moved_a:,} moved")
        return "; ".join(said)

    def cells(self) -> tuple[str, ...]:
        """Kind, tensors, pairs, moved (where training is over) and remarks, as texts."""
        moved = () if self.moved is None else (f"{self.moved:,}" if self.pairs or self.whole else "",)
        return self.kind, f"{self.tensors:,}", f"{self.pairs:,}", *moved, self.remarks

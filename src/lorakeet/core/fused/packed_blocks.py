"""Rows laid end to end seen as blocks of equal shape, so that many short rows go through one product or one kernel together.

A row is its own tokens behind a prefix, if the rows share one, that stands once before all of them. A block is some of a row's
queries with the keys up to its last one; blocks of equal shape are taken together. A block is filled up with its row's last
token: as keys that stand behind every real query, which the causal mask hides, and as queries whose results nobody reads. So no
number of one row meets another row, not even one that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 32  # of a length: products see whole ones, since oneDNN keeps code for every shape; rows with as many are alike


@dataclass(frozen=True)
class BlockTokens:
    """The tokens of some blocks (blocks, width), filled up with the row's last; where each is `own`: what is found belongs to it.

    A prefix stands in the first row as its own; the other rows look at it and answer nothing for it.
    """

    tokens: NDArray[np.int64]
    own: NDArray[np.bool_]
    shared: NDArray[np.bool_]  # blocks whose first tokens are the prefix, and not their own


@dataclass(frozen=True)
class QueryBlocks:
    """Blocks of queries of equal shape, each with the keys up to its last one: `offset` keys come before its first query."""

    queries: BlockTokens
    keys: BlockTokens
    offset: int
    prefix: int


@dataclass(frozen=True)
class _Row:
    """The tokens of a row, prefix and all, and how many of them are another row's."""

    tokens: NDArray[np.int64]
    shared: int


@lru_cache(maxsize=8)
def blocks_of_queries(rows: tuple[int, ...], prefix: int, heads: int, queries: int, scores: int) -> tuple[QueryBlocks, ...]:
    """All rows in blocks of up to `queries` queries, rounded up to whole pieces; as many together as have `scores` scores."""
    shapes: dict[tuple[int, int], list[tuple[_Row, int]]] = {}  # (queries, offset): rows, and where the block stops
    for row in _rows(rows, prefix):
        for start in range(0, len(row.tokens), queries):
            stop = min(start + queries, len(row.tokens))
            if stop <= row.shared:
                continue  # nothing of its own asks there
            shapes.setdefault((_whole(stop - start), start), []).append((row, stop))
    found = []
    for (width, offset), blocks in shapes.items():
        for chosen in _parted(blocks, scores // (heads * width * (offset + width))):
            asked = _places(chosen, offset, width)
            keys = asked if offset == 0 else _places(chosen, 0, offset + width)
            found.append(QueryBlocks(asked, keys, offset, prefix))
    return tuple(found)


@lru_cache(maxsize=8)
def whole_row_blocks(rows: tuple[int, ...], prefix: int, tokens: int) -> tuple[QueryBlocks, ...]:
    """Each row as one block, rows of nearly equal length together, the longest first, but those with the row that has the prefix
    as its own before all others.

    Filled up, those that go together have at most `tokens` places, and no more than all rows have tokens; or are one row.
    """
    every = sorted(_rows(rows, prefix), key=lambda row: -len(row.tokens))
    most = min(tokens, sum(len(row.tokens) for row in every))
    together: list[list[_Row]] = []
    for row in every:
        width = len(together[-1][0].tokens) if together else 0
        if not together or _whole(len(row.tokens)) < _whole(width) or (len(together[-1]) + 1) * width > most:
            together.append([])
        together[-1].append(row)
    together.sort(key=lambda alike: not any(row.shared == 0 for row in alike))
    found = []
    for alike in together:
        places = _places([(row, len(row.tokens)) for row in alike], 0, len(alike[0].tokens))
        found.append(QueryBlocks(places, places, 0, prefix))
    return tuple(found)


def _parted(blocks: list[tuple[_Row, int]], together: int) -> Iterator[list[tuple[_Row, int]]]:
    """`blocks` in parts of `together`, at least one."""
    size = max(1, together)
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]


def _rows(rows: tuple[int, ...], prefix: int) -> Iterator[_Row]:
    """The tokens of each row. The first one's own follow the prefix, so that together they are an ordinary row."""
    ends = list(accumulate((prefix + rows[0], *rows[1:])))
    for number, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = np.arange(start, stop)
        yield _Row(own, 0) if number == 0 else _Row(np.concatenate([np.arange(prefix), own]), prefix)


def _places(blocks: list[tuple[_Row, int]], start: int, width: int) -> BlockTokens:
    """The tokens of each row from `start` to where its block stops, filled up to `width` with the last one."""
    tokens = np.zeros((len(blocks), width), dtype=np.int64)
    own = np.zeros((len(blocks), width), dtype=np.bool_)
    for number, (row, stop) in enumerate(blocks):
        tokens[number, : stop - start] = row.tokens[start:stop]
        tokens[number, stop - start :] = row.tokens[stop - 1]
        own[number, max(0, row.shared - start) : stop - start] = True
    return BlockTokens(tokens, own, np.array([row.shared > start for row, _ in blocks]))


class Indexed:
    """The places of some blocks as tensors, to read states from and to write into tensors (tokens, heads, d)."""

    def __init__(self, places: BlockTokens, prefix: int, device: torch.device) -> None:
        self.shape = places.tokens.shape
        tokens = places.tokens.reshape(-1)  # of each place of the blocks
        whole = bool(places.own.all())
        self.first = whole and bool((tokens == np.arange(len(tokens))).all())  # the first tokens as they stand: nothing to move
        self.tokens = torch.tensor(tokens, device=device)
        self.own = None if whole else torch.tensor(np.flatnonzero(places.own), device=device)
        self.others = None if whole else torch.tensor(np.flatnonzero(~places.own), device=device)
        self.owners = self.tokens if self.own is None else self.tokens.index_select(0, self.own)
        self.prefix = prefix if places.shared.any() else 0
        self.sharing = torch.tensor(np.flatnonzero(places.shared), device=device) if self.prefix else None

    def of(self, states: Tensor, dtype: torch.dtype, *, blank: bool = False) -> Tensor:
        """The blocks (blocks, width, heads, d) of states (1, heads, tokens, d); what is not a block's own blank on demand."""
        source = states[0].transpose(0, 1)
        chosen = source[: len(self.tokens)] if self.first else source.index_select(0, self.tokens)
        chosen = chosen.to(dtype)
        if blank and self.others is not None:
            chosen.index_fill_(0, self.others, 0)
        return chosen.view(*self.shape, *chosen.shape[1:])

    def put(self, target: Tensor, found: Tensor) -> None:
        """Writes each block's own of (blocks, width, heads, d) to its places in (tokens, heads, d)."""
        if self.first:
            target[: len(self.tokens)] = found.flatten(0, 1)
        else:
            target.index_copy_(0, self.owners, self._own(found).to(target.dtype))

    def add(self, target: Tensor, found: Tensor) -> None:
        """Adds everything that `found` holds for the tokens, own or shared, to their places; shapes as in `put`."""
        own = self._own(found)
        if self.first:
            target[: len(self.tokens)] += own  # without a copy of the tokens, which are all of a long row
        else:
            target.index_copy_(0, self.owners, target.index_select(0, self.owners).add_(own))
        self.add_shared(target, found)

    def add_shared(self, target: Tensor, found: Tensor) -> None:
        """Adds what `found` holds for a prefix that is another row's own to the prefix's places; shapes as in `put`."""
        if self.sharing is not None:
            count = min(self.prefix, self.shape[1])
            target[:count] += found[:, :count].index_select(0, self.sharing).sum(0, dtype=target.dtype)

    def _own(self, found: Tensor) -> Tensor:
        flat = found.flatten(0, 1)
        return flat if self.own is None else flat.index_select(0, self.own)


def token_indices(blocks: QueryBlocks, device: torch.device) -> tuple[Indexed, Indexed]:
    """The places of the queries and of the keys of some blocks; one and the same where these are."""
    queries = Indexed(blocks.queries, blocks.prefix, device)
    return queries, queries if blocks.keys is blocks.queries else Indexed(blocks.keys, blocks.prefix, device)


def _whole(count: int) -> int:
    """`count` rounded up to whole PIECES."""
    return -(-count // PIECE) * PIECE

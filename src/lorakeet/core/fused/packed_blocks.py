"""Packed rows as blocks of equal shape, so that many short rows share one product or one kernel call.

A row is its own tokens after a shared prefix, if any, which is stored once before all rows. A block is some of a row's queries
with the keys up to the last of them; blocks of equal shape are computed together. A block is padded with its row's last token: as
keys after every real query, which the causal mask hides, and as queries whose results are not read. So no number of one row
affects another row, not even infinities or NaN.
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

PIECE = 32  # lengths are padded to multiples of this, since oneDNN compiles code for every shape; similar rows are grouped


@dataclass(frozen=True)
class BlockTokens:
    """The tokens of some blocks (blocks, width), padded with the row's last; `own`: whether the results belong to the block.

    A prefix belongs to the first row; the other rows only read it.
    """

    tokens: NDArray[np.int64]
    own: NDArray[np.bool_]
    shared: NDArray[np.bool_]  # blocks that start with the prefix without owning it


@dataclass(frozen=True)
class QueryBlocks:
    """Blocks of queries of equal shape, each with the keys up to its last one: `offset` keys before its first query."""

    queries: BlockTokens
    keys: BlockTokens
    offset: int
    prefix: int


@dataclass(frozen=True)
class _Row:
    """The tokens of a row with the prefix, and how many of them belong to another row."""

    tokens: NDArray[np.int64]
    shared: int


@lru_cache(maxsize=8)
def blocks_of_queries(rows: tuple[int, ...], prefix: int, heads: int, queries: int, scores: int) -> tuple[QueryBlocks, ...]:
    """All rows in blocks of up to `queries` queries, padded to whole pieces; together as many as have `scores` scores."""
    shapes: dict[tuple[int, int], list[tuple[_Row, int]]] = {}  # (queries, offset): rows, and where the block stops
    for row in _rows(rows, prefix):
        for start in range(0, len(row.tokens), queries):
            stop = min(start + queries, len(row.tokens))
            if stop <= row.shared:
                continue  # none of its own queries
            shapes.setdefault((_whole(stop - start), start), []).append((row, stop))
    found = []
    for (width, offset), blocks in shapes.items():
        size = max(1, scores // (heads * width * (offset + width)))
        for at in range(0, len(blocks), size):
            chosen = blocks[at : at + size]
            queries_of = _places(chosen, offset, width)
            keys = queries_of if offset == 0 else _places(chosen, 0, offset + width)
            found.append(QueryBlocks(queries_of, keys, offset, prefix))
    return tuple(found)


@lru_cache(maxsize=8)
def whole_row_blocks(rows: tuple[int, ...], prefix: int, tokens: int) -> tuple[QueryBlocks, ...]:
    """Each row as one block, rows of nearly equal length together, the longest first, after those with the row that owns the
    prefix.

    Padded groups have at most `tokens` places, and no more than all rows have tokens; or are one row.
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


def _rows(rows: tuple[int, ...], prefix: int) -> Iterator[_Row]:
    """The tokens of each row. The first row's own tokens follow the prefix, so that together they are an ordinary row."""
    ends = list(accumulate((prefix + rows[0], *rows[1:])))
    for number, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = np.arange(start, stop)
        yield _Row(own, 0) if number == 0 else _Row(np.concatenate([np.arange(prefix), own]), prefix)


def _places(blocks: list[tuple[_Row, int]], start: int, width: int) -> BlockTokens:
    """The tokens of each row from `start` to its block's end, padded to `width` with the last one."""
    tokens = np.zeros((len(blocks), width), dtype=np.int64)
    own = np.zeros((len(blocks), width), dtype=np.bool_)
    for number, (row, stop) in enumerate(blocks):
        tokens[number, : stop - start] = row.tokens[start:stop]
        tokens[number, stop - start :] = row.tokens[stop - 1]
        own[number, max(0, row.shared - start) : stop - start] = True
    return BlockTokens(tokens, own, np.array([row.shared > start for row, _ in blocks]))


class Indexed:
    """The token indices of some blocks as tensors, to read from and write to states (tokens, heads, d)."""

    def __init__(self, places: BlockTokens, prefix: int, device: torch.device) -> None:
        self.shape = places.tokens.shape
        tokens = places.tokens.reshape(-1)  # of each place in the blocks
        whole = bool(places.own.all())
        self.first = whole and bool((tokens == np.arange(len(tokens))).all())  # the first tokens in order: nothing to gather
        self.tokens = torch.tensor(tokens, device=device)
        self.own = None if whole else torch.tensor(np.flatnonzero(places.own), device=device)
        self.others = None if whole else torch.tensor(np.flatnonzero(~places.own), device=device)
        self.owners = self.tokens if self.own is None else self.tokens.index_select(0, self.own)
        self.prefix = prefix if places.shared.any() else 0
        self.sharing = torch.tensor(np.flatnonzero(places.shared), device=device) if self.prefix else None

    def of(self, states: Tensor, dtype: torch.dtype, *, blank: bool = False) -> Tensor:
        """The blocks (blocks, width, heads, d) of states (1, heads, tokens, d); with `blank`, zeros where another block owns."""
        source = states[0].transpose(0, 1)
        chosen = source[: len(self.tokens)] if self.first else source.index_select(0, self.tokens)
        chosen = chosen.to(dtype)
        if blank and self.others is not None:
            chosen.index_fill_(0, self.others, 0)
        return chosen.view(*self.shape, *chosen.shape[1:])

    def put(self, target: Tensor, found: Tensor) -> None:
        """Writes what each block owns of (blocks, width, heads, d) to (tokens, heads, d)."""
        if self.first:
            target[: len(self.tokens)] = found.flatten(0, 1)
        else:
            target.index_copy_(0, self.owners, self._own(found).to(target.dtype))

    def add(self, target: Tensor, found: Tensor) -> None:
        """Adds all of `found`, owned or shared, to the tokens; shapes as in `put`."""
        own = self._own(found)
        if self.first:
            target[: len(self.tokens)] += own  # without a copy of the tokens of a long row
        else:
            target.index_copy_(0, self.owners, target.index_select(0, self.owners).add_(own))
        self.add_shared(target, found)

    def add_shared(self, target: Tensor, found: Tensor) -> None:
        """Adds the parts of `found` for a prefix that another row owns to the prefix; shapes as in `put`."""
        if self.sharing is not None:
            count = min(self.prefix, self.shape[1])
            target[:count] += found[:, :count].index_select(0, self.sharing).sum(0, dtype=target.dtype)

    def _own(self, found: Tensor) -> Tensor:
        flat = found.flatten(0, 1)
        return flat if self.own is None else flat.index_select(0, self.own)


def token_indices(blocks: QueryBlocks, device: torch.device) -> tuple[Indexed, Indexed]:
    """The indices of the queries and of the keys of some blocks; one object if they are equal."""
    queries = Indexed(blocks.queries, blocks.prefix, device)
    return queries, queries if blocks.keys is blocks.queries else Indexed(blocks.keys, blocks.prefix, device)


def _whole(count: int) -> int:
    """`count` rounded up to a multiple of PIECE."""
    return -(-count // PIECE) * PIECE

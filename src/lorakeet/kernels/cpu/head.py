"""Losses of a head's logits and their gradients, as an operator of torch (head.c).

Logits (tokens, vocabulary) are bf16, stored in tiles: one block (tokens, columns) after another, each of `tile` columns, as the
products with a head's tiles of rows give them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.operators import define, loaded, pointers
from lorakeet.kernels.protocol import Situation

NEEDS = operators.NEEDS
TILED = True  # the logits


def why_not(situation: Situation) -> str:
    """Why losses are not computed here."""
    return operators.why_not(situation)


def takes(hidden: Tensor, _: int) -> bool:
    """True for states (tokens, hidden) that C can read."""
    return operators.takes((hidden,))


def blocks(logits: Tensor, tile: int) -> list[tuple[slice, Tensor]]:
    """The columns of each tile, and its block (tokens, columns) in the memory of `logits`."""
    tokens, vocabulary = logits.shape
    flat, found = logits.view(-1), []
    for start in range(0, vocabulary, tile):
        columns = slice(start, min(start + tile, vocabulary))
        found.append((columns, flat[tokens * columns.start : tokens * columns.stop].view(tokens, -1)))
    return found


def head_losses_(logits: Tensor, targets: Tensor, tile: int, wants_grad: bool) -> Tensor:
    """−log p(target) (tokens,) in fp32; with `wants_grad` the logits are overwritten with ∂L/∂z, rounded once."""
    tokens, vocabulary = logits.shape
    if targets.shape != (tokens,) or tile <= 0 or (tokens and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary):
        received = f"given: {tuple(targets.shape)}, tile {tile}"
        raise ValueError(f"expected {tokens} targets in 0 … {vocabulary - 1} and a tile above 0; {received}")
    losses = logits.new_empty(tokens, dtype=torch.float32)
    given = *pointers(logits), *pointers(targets, dtype=torch.int64), *pointers(losses, dtype=torch.float32)
    sizes = (ctypes.c_int64(size) for size in (tokens, vocabulary, tile))
    loaded().head_losses(*given, *sizes, int(wants_grad), torch.get_num_threads())
    return losses


HEAD_LOSSES = define(
    "head_losses_(Tensor(a!) logits, Tensor targets, int tile, bool wants_grad) -> Tensor",
    head_losses_,
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32),
)

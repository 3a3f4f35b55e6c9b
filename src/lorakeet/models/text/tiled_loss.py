"""Cross-entropy under a frozen head that is read once, tile by tile, for all targets, with its gradient by the states.

With z = W·h for one position, its target t, and sums over every token v but t:

    m = max z        r = Σ e^(z_v − m)        g = Σ e^(z_v − m)·W_v

    L = log(r + e^(z_t − m)) + m − z_t        ∂L/∂h = (g − r·W_t) / (r + e^(z_t − m))

m, r and g grow tile by tile; what was summed is scaled down first where a tile has a larger m (https://arxiv.org/abs/1805.02867).
So no logits of the whole vocabulary exist, and none are computed twice. The target's own term is left out of the sums: p_t − 1
would lose its digits where p_t is near 1. Other sums than train/text/loss has: equal but for rounding.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from lorakeet.core.base import frozen_product
from lorakeet.core.tiled_product import TILE, RowSource
from lorakeet.kernels.device import is_cpu
from lorakeet.memory.stream import StreamedRows


def is_read_in_tiles(weight: RowSource | None, device: torch.device) -> TypeGuard[StreamedRows]:
    """True for the weight of a head that comes from a store to a GPU. To a CPU it comes from the page cache, chunk by chunk."""
    return isinstance(weight, StreamedRows) and not is_cpu(device)


@torch.no_grad()
def tiled_losses(
    states: Tensor, weight: StreamedRows, targets: Tensor, *, chunk: int, wants_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """−log softmax(states·Wᵀ)[target] (n,) in fp32 or fp64 and, if wanted, its gradient by the states (n, hidden), not recorded.

    `states` (n, hidden), W (vocabulary, hidden) and targets (n,). At most `chunk` × vocabulary logits exist at a time.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    known = torch.zeros((len(states), 3), dtype=wide, device=states.device)  # of each position m, r and z_t
    known[:, 0] = -torch.inf
    total = torch.zeros_like(states, dtype=wide) if wants_grad else None  # g
    own = torch.empty_like(states, dtype=weight.dtype) if wants_grad else None  # W_t
    together = chunk * max(1, weight.shape[0] // TILE)
    parts = [slice(start, start + together) for start in range(0, len(targets), together)]
    for tile, rows in weight.in_tiles(TILE) if parts else ():
        for part in parts:
            places = targets[part] - tile.start
            _add_tile(states[part], rows, places, known[part], None if total is None else total[part])
            if own is not None:
                _take_own(rows, places, own[part])
    top, rest, chosen = known.split(1, dim=1)  # type: ignore[no-untyped-call]
    norm = rest + (chosen - top).exp()
    losses = (norm.log() + top - chosen).squeeze(1)
    if total is None or own is None:
        return losses, None
    for part in parts:
        total[part] -= own[part] * rest[part]
    return losses, total.div_(norm).to(states.dtype)


def _add_tile(states: Tensor, rows: Tensor, places: Tensor, known: Tensor, total: Tensor | None) -> None:
    """Adds a tile W (rows, hidden) to what is known of `states` (n, hidden) and to their `total`, in place.

    `places` (n,) are the targets, counted from the tile's first row.
    """
    top, rest, chosen = known.split(1, dim=1)  # type: ignore[no-untyped-call]
    logits = frozen_product(states, rows).to(top.dtype)
    index = places.clamp(0, len(rows) - 1)
    here, column = (index == places).unsqueeze(1), index.unsqueeze(1)
    chosen.copy_(torch.where(here, logits.gather(1, column), chosen))
    highest = torch.maximum(top, logits.amax(1, keepdim=True))
    scale = (top - highest).exp_()
    terms = logits.sub_(highest).exp_()
    terms.scatter_(1, column, terms.gather(1, column).masked_fill_(here, 0))
    rest.mul_(scale).add_(terms.sum(1, keepdim=True))
    top.copy_(highest)
    if total is not None:
        total.mul_(scale).add_(frozen_product(terms.to(rows.dtype), rows, across=True))


def _take_own(rows: Tensor, places: Tensor, own: Tensor) -> None:
    """Writes the rows of those targets that are in the tile to `own` (n, hidden)."""
    index = places.clamp(0, len(rows) - 1)
    own.copy_(torch.where((index == places).unsqueeze(1), rows.index_select(0, index), own))

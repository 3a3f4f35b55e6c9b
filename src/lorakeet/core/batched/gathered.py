"""Products with rows gathered from a table: dot products and weighted sums, each row read once and nothing copied.

Tokens with different pairs use a few rows of many: an A has `rank` rows of x's width, a Bᵀ as many of y's. Batched products of
one row each read bf16 at a fifth of the speed of memory on a CPU, and fp32 at half of it (docs/log); torch's kernels for
embeddings read both at nearly full speed, and sum in fp32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorakeet.kernels.device import is_cpu

_SUM = 0  # the mode of an embedding bag


def row_dots(x: Tensor, tokens: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """x[tokens[i]]·table[rows[i]] for each i: x (n, width), table (N, width), tokens and rows (k,), to (k,) in their dtype."""
    if is_cpu(x.device) and _adds_up_well(table.dtype):
        # The gradient of an embedding bag for the weights of its rows is just that; the offsets are not used.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, table, rows, tokens, tokens, _SUM)  # type: ignore[no-any-return]
    return torch.bmm(table[rows].unsqueeze(1), x[tokens].unsqueeze(2)).flatten()


def row_sums(weights: Tensor, table: Tensor, rows: Tensor, firsts: Tensor) -> Tensor:
    """Σ weights[i]·table[rows[i]] over i from firsts[j] up to the next: table (N, width), weights and rows (k,), firsts (m,).

    (m, width), zeros where there is nothing to add.
    """
    return torch.embedding_bag(table, rows, firsts, False, _SUM, False, weights)[0]


@cache
def _adds_up_well(dtype: torch.dtype) -> bool:
    """True if torch has the kernel and it sums in more than `dtype`: tried on a few numbers."""
    if not hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward"):
        return False
    width = 1024
    table = torch.stack([torch.ones(width), torch.linspace(-1, 1, width)]).to(dtype)
    at = torch.tensor([0, 1])
    try:
        found = torch.ops.aten._embedding_bag_per_sample_weights_backward(table[:1], table, at, at, at.new_zeros(2), _SUM)
    except RuntimeError:
        return False
    return bool(torch.allclose(found.float(), table.float().sum(1), rtol=1e-2, atol=0.05))

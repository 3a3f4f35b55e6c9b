"""Cross-entropy of a chunk of logits and its gradient as one Triton kernel. **Not run on a GPU yet.**

torch reads and writes the logits in GPU memory half a dozen times. Here a program has one row: it reads the row once for its
largest logit m and the sum n of exp(z − m), and once more to overwrite it with p − onehot(t), p = exp(z − m)/n. Both are found in
one pass (https://arxiv.org/abs/1805.02867): a larger logit m' in a later part multiplies the earlier sum by exp(m − m'). Every
lane has an m and an n for its own columns; all are joined at the end.

    L = m + log n − z_t        ∂L/∂z = p − onehot(t)                                 as derived in train/text/loss
"""

import triton
import triton.language as tl
from torch import Tensor

from lorakeet.kernels.triton.tiles import on_device

COLUMNS = 4096  # of a row at once
TILED = False  # the logits


def loss_in_place(logits: Tensor, targets: Tensor, *, wants_grad: bool) -> Tensor:
    """Logits z (n, vocabulary), fp32, rows contiguous, and targets (n,) to the losses (n,), fp32; z becomes ∂L/∂z if wanted, else
    it stays.

    Finite logits and −inf are supported. +inf, NaN and a target outside the vocabulary make the row's loss NaN, as in torch; such
    a target also makes its gradient NaN. ValueError for other shapes, and for strided rows.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and targets {tuple(targets.shape)}; expected (n, vocabulary) and (n,)"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"the logits of a row are {logits.stride(1)} numbers apart; expected contiguous rows")
    targets = targets.contiguous()
    losses = logits.new_empty(len(logits))
    columns = min(COLUMNS, triton.next_power_of_2(logits.shape[1]))
    if len(logits):
        with on_device(logits.device):
            _row[(len(logits),)](logits, logits.stride(0), targets, losses, logits.shape[1], wants_grad, columns, num_warps=8)
    return losses


@triton.jit
def _row(logits, stride, targets, losses, vocabulary, WANTS_GRAD: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    chosen = tl.load(first + target, mask=known, other=float("nan"))
    lowest = -3.0e38  # no lane falls below it, so that infinities are never subtracted
    top = tl.full((COLUMNS,), lowest, tl.float32)
    norm = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = tl.load(first + column, mask=column < vocabulary, other=float("-inf"))
        higher = tl.maximum(top, z)
        norm = norm * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    largest = tl.max(top, 0)
    total = tl.sum(norm * tl.exp(top - largest), 0)
    tl.store(losses + row, largest + tl.log(total) - chosen)
    if WANTS_GRAD:
        for start in range(0, vocabulary, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < vocabulary
            z = tl.load(first + column, mask=inside, other=float("-inf"))
            grad = tl.exp(z - largest) / total - tl.where(column == target, 1.0, 0.0)
            tl.store(first + column, tl.where(known, grad, float("nan")), mask=inside)

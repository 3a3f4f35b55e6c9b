"""The text loss: cross-entropy on target tokens, with the head applied to those positions alone, in chunks.

A vocabulary is far wider than a hidden state: logits of 2,048 tokens over 128,000 words take 1 GB in fp32, their gradient
another. Here at most `chunk` × vocabulary logits exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lorakeet.core.base import frozen_product, write_frozen_product
from lorakeet.core.tiled_product import TILE, RowSource, add_back_products, back_product, tiles
from lorakeet.data.pack import Batch
from lorakeet.kernels.choose import loss_kernel
from lorakeet.kernels.protocol import HeadLosses
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.tiled_loss import is_read_in_tiles, tiled_losses

CHUNK = 256


def text_loss(text: TextModel, batch: Batch, *, chunk: int = CHUNK) -> tuple[Tensor, int]:
    """The sum of −log p(target) over the target tokens of `batch`, with gradient, and their number."""
    return head_losses(text, text.hidden(batch), batch.target_ids, chunk=chunk).sum(), batch.targets


def head_losses(text: TextModel, hidden: Tensor, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """−log p(target) (n,) from the decoder's hidden states (n, hidden) and targets (n,), with gradient."""
    targets = targets.to(hidden.device)
    weight = text.head_weight
    if weight is not None:
        return frozen_head_losses(hidden, weight, targets, chunk=chunk)
    return any_head_losses(hidden, text.head, targets, chunk=chunk)


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropies under a frozen head W (vocab, hidden); each ∂L/∂h is computed in forward.

    With z = W·h and p = softmax(z) for one position with target t:

        L = log Σ exp z − z_t        ∂L/∂z = p − onehot(t)        ∂L/∂h = (p − onehot(t))·W

    W gets no gradient, so ∂L/∂h needs only the factor ∂/∂L, one number each, from backward. It is computed per chunk from the
    current z: no logits are stored and none are computed twice. Softmax runs in fp32. W is used in tiles of rows, in memory or
    from a store, so that both give the same bits. On a GPU a kernel of liger-kernel, where installed, computes loss and ∂L/∂z
    from z (kernels/liger); in bf16 on a CPU a C kernel does so in place (kernels/cpu/head), which saves z in fp32. A W that
    comes from a store to a GPU is read once (models/text/tiled_loss).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: RowSource, targets: Tensor, chunk: int, wants_grad: bool
    ) -> Tensor:
        if is_read_in_tiles(weight, hidden.device):
            losses, grad = tiled_losses(hidden, weight, targets, chunk=chunk, wants_grad=wants_grad)
            if grad is not None:
                ctx.save_for_backward(grad)
            return losses
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(targets), dtype=exact, device=hidden.device)
        grad = torch.empty_like(hidden) if wants_grad else None
        kernel = loss_kernel(hidden, weight.dtype, weight.shape[0])
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            if kernel is not None and kernel.TILED:
                losses[part], found = _in_tiles(hidden[part], weight, targets[part], wants_grad, kernel)
                if grad is not None and found is not None:
                    grad[part] = found
                continue
            own = losses[part], None if grad is None else grad[part]
            _write_chunk(hidden[part], weight, targets[part], *own, kernel)
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype).unsqueeze(1), None, None, None, None


def _write_chunk(
    hidden: Tensor, weight: RowSource, targets: Tensor, losses: Tensor, grad: Tensor | None, kernel: HeadLosses | None
) -> None:
    """Writes the losses (n,) of a chunk and, if wanted, its ∂L/∂h (n, hidden). Its logits end with it."""
    logits = torch.empty((len(hidden), weight.shape[0]), dtype=losses.dtype, device=hidden.device)  # (chunk, vocab)
    for tile in tiles(weight.shape[0]):
        logits[:, tile] = frozen_product(hidden, weight[tile])
    losses[:] = _loss_in_place(logits, targets, grad is not None, kernel)
    if grad is not None:
        grad[:] = back_product(logits, weight, weight.dtype)


def _in_tiles(
    hidden: Tensor, weight: RowSource, targets: Tensor, wants_grad: bool, kernel: HeadLosses
) -> tuple[Tensor, Tensor | None]:
    """Losses (n,) and, if wanted, ∂L/∂h (n, hidden) in fp32, of logits in the dtype of the states."""
    logits = hidden.new_empty(len(hidden), weight.shape[0])
    of_tiles = kernel.blocks(logits, TILE)
    for tile, block in of_tiles:
        write_frozen_product(block, hidden, weight[tile])
    losses = kernel.HEAD_LOSSES(logits, targets, TILE, wants_grad)
    if not wants_grad:
        return losses, None
    total = torch.zeros(hidden.shape)
    add_back_products(total, of_tiles, weight)
    return losses, total


def _loss_in_place(logits: Tensor, targets: Tensor, wants_grad: bool, kernel: HeadLosses | None) -> Tensor:
    """Logits z (n, vocabulary) and targets (n,) to the losses (n,). Overwrites z: with ∂L/∂z if wanted, else undefined."""
    if kernel is not None:
        return kernel.loss_in_place(logits, targets, wants_grad=wants_grad)
    index = targets.unsqueeze(1)
    chosen = logits.gather(1, index).squeeze(1)
    top = logits.amax(1, keepdim=True)
    likelihood = logits.sub_(top).exp_()  # the unnormalised p
    norm = likelihood.sum(1, keepdim=True)
    if wants_grad:
        likelihood.div_(norm).scatter_add_(1, index, torch.full_like(norm, -1.0))
    return (norm.log() + top).squeeze(1).sub_(chosen)


def frozen_head_losses(hidden: Tensor, weight: RowSource, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """−log softmax(hidden·Wᵀ)[target] (n,); hidden (n, hidden), W (vocab, hidden) frozen, targets (n,)."""
    if hidden.dtype != weight.dtype:
        hidden = hidden.to(weight.dtype)
    wants_grad = torch.is_grad_enabled() and hidden.requires_grad  # inside forward() gradients are always off
    return cast(Tensor, _FrozenHeadLoss.apply(hidden, weight, targets, chunk, wants_grad))  # type: ignore[no-untyped-call]


def any_head_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The same for any head: adapted, with new rows, biased or soft-capped. Backward recomputes each chunk."""
    found = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        found.append(cast(Tensor, checkpoint(_chunk_losses, head, hidden[part], targets[part], use_reentrant=False)))
    return torch.cat(found)


def _chunk_losses(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(exact, targets, reduction="none")

"""Quantisation-aware finish of a merge into a quantised model: a few steps that train the pairs through the quantiser.

    forwards     y = x·Q(V + s·(B·A − B₀·A₀))ᵀ + b       Q: to the nearest value of the grid
    backwards    ∂Q(W)/∂W = 1                            (Bengio et al. 2013, https://arxiv.org/abs/1308.3432)

V (out, in) is the merged weight just before rounding with error feedback (merging/requantise): with B = B₀ and A = A₀ the layer
computes what was packed. V's numbers lie anywhere between the values of the grid, so small changes of A and B change some codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import delta, grad_of_b, scale_of, shrink_grad
from lorakeet.data.chat import Example
from lorakeet.merging.requantise import Requantised
from lorakeet.models.modules import find, replace
from lorakeet.models.text.model import TextModel
from lorakeet.quant.grids import FixedGrid
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.train import schedule
from lorakeet.train.optimizer import Optimizer
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.loss import text_loss
from lorakeet.train.text.task import learning_rate_of, order_of

CLIP = 1.0
RATE = 0.1  # share of the run's rate: at the full rate, 20 steps on SmolLM2 in GPTQ undid part of the error feedback
WARMUP = 0.1  # share of the steps: AdamW's first steps are as long as the rate for any gradient


def quantisation_aware_finish(
    text: TextModel,
    solved: MutableMapping[str, Requantised],
    adapter: Adapter,
    rows: Sequence[Example],
    *,
    steps: int,
    spec: TrainSpec,
    products: torch.dtype,
    on_step: Callable[[int, float], None],
) -> dict[str, PackedBase]:
    """Trains the pairs of `adapter` through the grids of `solved`, whose packed layers are in `text`; returns the new layers.

    The seed is that of the run; the rate rises to `RATE` times the run's and falls linearly. Matrix products run in `products`
    (core/precision), codes are chosen in fp32. `on_step` gets each step and its loss in nats per token. `text` contains the
    returned layers. The latent weights are removed from `solved`: they are as large as the model in fp32.
    """
    layers: dict[str, StraightThroughLinear] = {}
    for path, pair in adapter.pairs.items():
        if path in solved:
            latent = solved[path].latent
            if latent is None:
                raise ValueError(f"{path} was packed without its unrounded weights, which are trained here")
            bias = cast("Tensor | None", cast(nn.Module, find(text.model, path)).bias)
            layers[path] = StraightThroughLinear(latent.numbers, pair, latent.grid, bias, products=products)
            replace(text.model, path, layers[path])
            solved[path] = dataclasses.replace(solved[path], latent=None)
            del latent
    parameters = {f"{path}.{leaf}": layer.get_parameter(leaf) for path, layer in layers.items() for leaf in ("A", "B")}
    optimizer = Optimizer(parameters, dataclasses.replace(spec, weight_decay=0.0))
    rate = RATE * (spec.learning_rate or learning_rate_of(text))
    order, warmup = order_of(rows, spec), schedule.warmup_steps(steps, WARMUP)
    for step in range(steps):
        batches = text.micro_batches([rows[row] for row in order.indices(step)], spec.micro_tokens)
        targets, total = sum(batch.targets for batch in batches), 0.0
        for batch in batches:
            loss, _ = text_loss(text, batch.to(text.device), chunk=spec.head_chunk)
            (loss / targets).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step(rate * schedule.factor(step + 1, steps, warmup=warmup, shape="linear"))
        for layer in layers.values():
            layer.round()
        on_step(step + 1, total / targets)
    bases = {path: layer.packed() for path, layer in layers.items()}
    for path, base in bases.items():
        replace(text.model, path, PackedLinear(base, layers[path].bias))
    return bases


class StraightThroughLinear(nn.Module):
    """Replaces a packed layer while its pair is trained through the grid.

    It computes with the weight of the last `round`, stored in `products`, the dtype of its matrix products.
    """

    def __init__(
        self, latent: Tensor, pair: Pair, grid: FixedGrid, bias: Tensor | None, *, products: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.scale = scale_of(pair.alpha, pair.rank, pair.scale_rule)
        self.A, self.B = (nn.Parameter(factor.detach().clone().float().to(latent.device)) for factor in (pair.A, pair.B))
        with torch.no_grad():
            self.start = latent - delta(self.A, self.B, self.scale)  # V − s·B₀·A₀
        self.grid, self.products = grid, products
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.round()

    @torch.no_grad()
    def weight(self) -> Tensor:
        """V + s·(B·A − B₀·A₀), (out, in) fp32."""
        return delta(self.A, self.B, self.scale).add_(self.start)

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the weight with the present A and B to the nearest values of the grid."""
        self.rounded = self.grid.values(self.weight()).to(self.products)

    @torch.no_grad()
    def packed(self) -> PackedBase:
        """The nearest values, packed."""
        return self.grid.nearest(self.weight())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _StraightThrough.apply(flat, self.A, self.B, self.scale, self.rounded, self.bias)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])


class _StraightThrough(torch.autograd.Function):
    """y = x·Qᵀ + b, whose gradient is that of x·(V + s·(B·A − B₀·A₀))ᵀ for A and B, and g·Q for x.

    With g = ∂L/∂y, and ∂Q/∂W taken as 1, ∂L/∂W = gᵀ·x, so that for W = V + s·(B·A − B₀·A₀)

        ∂L/∂A = s·Bᵀ·(gᵀ·x) = (s·g·B)ᵀ·x      ∂L/∂B = s·(gᵀ·x)·Aᵀ = s·gᵀ·(x·Aᵀ)      ∂L/∂x = g·Q

    The rank-sized factor is multiplied first, so no gradient of W is ever formed (as in core/lowrank).
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - apply() takes positional arguments only
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, scale: float, rounded: Tensor, bias: Tensor | None
    ) -> Tensor:
        wide, a, b = (factor.to(rounded.dtype) for factor in (x, A, B))
        y = torch.mm(wide, rounded.t())
        ctx.save_for_backward(wide, torch.mm(wide, a.t()), b, rounded)
        ctx.scale, ctx.dtypes = scale, (x.dtype, A.dtype)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shrunk, b, rounded = ctx.saved_tensors
        dtype_x, dtype_pair = ctx.dtypes
        grad = grad.to(rounded.dtype).contiguous()
        grad_a = torch.mm(shrink_grad(grad, b, ctx.scale).t(), x).to(dtype_pair)
        grad_b = grad_of_b(grad, shrunk, ctx.scale).to(dtype_pair)
        grad_x = torch.mm(grad, rounded).to(dtype_x) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, grad_b, None, None, None

"""Elementwise ops of a block as operators of torch (elementwise.c): RMSNorm, the gate of an MLP, rotary positions.

kernels/liger has functions of the same names for a GPU (kernels/choose.ElementwiseOps).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lorakeet.kernels.cpu.operators import define, loaded, pointers


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y = w ∘ (x·ρ) and ρ = 1/√(mean(x²) + ε) (…, 1) in fp32, of x (…, width) and w (width,)."""
    y, rho = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
    loaded().norm(*pointers(x, weight), ctypes.c_float(epsilon), *pointers(y), *pointers(rho, dtype=torch.float32), *_sizes(x))
    return y, rho


def _norm_again(x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """Recomputes the y of `norm`, to the last bit, from its ρ."""
    y = torch.empty_like(x)
    loaded().norm_again(*pointers(x), *pointers(rho, dtype=torch.float32), *pointers(weight, y), *_sizes(x))
    return y


def _norm_backward(grad: Tensor, x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)), x̂ = x·ρ."""
    found = torch.empty_like(x)
    loaded().norm_backward(*pointers(grad, x), *pointers(rho, dtype=torch.float32), *pointers(weight, found), *_sizes(x))
    return found


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up."""
    inner = torch.empty_like(gate)
    loaded().gated(*pointers(gate, up, inner), ctypes.c_int64(gate.numel()), torch.get_num_threads())
    return inner


def _gated_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """Given the gradient of `gated`, overwrites gate and up with ∂gate and ∂up, and `grad` with the result of `gated`."""
    loaded().gated_backward(*pointers(gate, up, grad), ctypes.c_int64(gate.numel()), torch.get_num_threads())


def _rotate_(states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Rotates (tokens, heads, head) by the angles (tokens, head), or back, in place: core/fused/attention.rotated."""
    tokens, heads, head = states.shape
    sizes = (ctypes.c_int64(size) for size in (tokens, heads, head // 2))
    loaded().rotate(*pointers(states, cos, sin), *sizes, int(back), torch.get_num_threads())


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, int]:
    """Tokens, width and threads."""
    return ctypes.c_int64(x.numel() // x.shape[-1]), ctypes.c_int64(x.shape[-1]), torch.get_num_threads()


norm = define(
    "norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    _norm,
    lambda x, *_: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
)
norm_again = define("norm_again(Tensor x, Tensor rho, Tensor weight) -> Tensor", _norm_again, lambda x, *_: torch.empty_like(x))
norm_backward = define(
    "norm_backward(Tensor grad, Tensor x, Tensor rho, Tensor weight) -> Tensor",
    _norm_backward,
    lambda grad, x, *_: torch.empty_like(x),
)
gated = define("gated(Tensor gate, Tensor up) -> Tensor", _gated, lambda gate, _: torch.empty_like(gate))
gated_backward_ = define(
    "gated_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor(c!) grad) -> ()", _gated_backward_, lambda *_: None
)
rotate_ = define("rotate_(Tensor(a!) states, Tensor cos, Tensor sin, bool back) -> ()", _rotate_, lambda *_: None)

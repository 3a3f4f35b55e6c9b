"""Elementwise ops of a block as one Triton kernel each: RMSNorm, the gate of an MLP, rotary positions.

**Not run on a GPU yet.**

torch needs several operations for each; a GPU launches them one by one, which dominates when few tokens are computed at once
(benchmarks/launches.py). Arguments and formulas are those of kernels/cpu/elementwise, the same for a CPU. All compute in fp32 and
round what they write; a norm also rounds x·ρ before its gain, as transformers does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakeet.kernels.triton.tiles import on_device

NUMBERS = 1024  # that a program of the gate computes


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y = w ∘ (x·ρ) and ρ = 1/√(mean(x²) + ε) (…, 1) in fp32, of x (…, width) and w (width,)."""
    y, rho = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _by_rows(_norm, x, x, weight, y, rho, x.shape[-1], epsilon, False)
    return y, rho


def norm_again(x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """Recomputes the y of `norm`, to the last bit, from its ρ."""
    y = torch.empty_like(x)
    _by_rows(_norm, x, x, weight, y, rho, x.shape[-1], 0.0, True)
    return y


def norm_backward(grad: Tensor, x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)), x̂ = x·ρ."""
    found = torch.empty_like(x)
    _by_rows(_norm_backward, x, grad, x, rho, weight, found, x.shape[-1])
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up."""
    inner = torch.empty_like(gate)
    _by_numbers(_gated, gate, gate, up, inner)
    return inner


def gated_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """Given the gradient g of y = silu(z) ∘ u, overwrites gate and up with ∂z, ∂u, and `grad` with y. With σ = 1/(1 + exp(−z)),

        silu(z) = z·σ      dsilu/dz = σ + z·σ·(1 − σ)      ∂z = g ∘ u ∘ (σ + z·σ·(1 − σ))      ∂u = g ∘ z·σ
    """
    _by_numbers(_gated_backward, gate, gate, up, grad)


def rotate_(states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Rotates (tokens, heads, head) by the angles (tokens, head), or back, in place: core/fused/attention.rotated."""
    tokens, heads, head = states.shape
    if tokens * heads:
        with on_device(states.device):
            _turn[(tokens * heads,)](states, cos, sin, heads, head // 2, back, triton.next_power_of_2(head // 2), num_warps=1)


def _by_rows(kernel, x: Tensor, *given: object) -> None:
    """Launches a program for each row of x."""
    width = x.shape[-1]
    if x.numel():
        with on_device(x.device):
            kernel[(x.numel() // width,)](*given, triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8)


def _by_numbers(kernel, x: Tensor, *given: Tensor) -> None:
    """Launches a program for every NUMBERS of x."""
    if x.numel():
        with on_device(x.device):
            kernel[(triton.cdiv(x.numel(), NUMBERS),)](*given, x.numel(), NUMBERS, num_warps=4)


@triton.jit
def _wide(places, inside):
    """Loads numbers in fp32, zeros outside."""
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm(x, weight, y, rho, width, epsilon, KNOWN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    numbers = _wide(x + row * width + column, inside)
    if KNOWN:
        scale = tl.load(rho + row)
    else:
        scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 0) / width + epsilon)
        tl.store(rho + row, scale)
    normal = (numbers * scale).to(y.dtype.element_ty).to(tl.float32)
    gain = _wide(weight + column, inside)
    tl.store(y + row * width + column, (gain * normal).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(grad, x, rho, weight, found, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    scale = tl.load(rho + row)
    scaled = _wide(grad + place, inside) * _wide(weight + column, inside)
    normal = _wide(x + place, inside) * scale
    share = tl.sum(scaled * normal, 0) / width
    tl.store(found + place, ((scaled - normal * share) * scale).to(found.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid(z):
    below = tl.exp(-tl.abs(z))  # never overflows
    return tl.where(z >= 0, 1.0, below) / (1.0 + below)


@triton.jit
def _gated(gate, up, inner, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    z = _wide(gate + place, inside)
    u = _wide(up + place, inside)
    tl.store(inner + place, (z * _sigmoid(z) * u).to(inner.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(gate, up, grad, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    z = _wide(gate + place, inside)
    u = _wide(up + place, inside)
    g = _wide(grad + place, inside)
    part = _sigmoid(z)
    active = z * part
    tl.store(gate + place, (g * u * (part + active * (1.0 - part))).to(gate.dtype.element_ty), mask=inside)
    tl.store(up + place, (g * active).to(up.dtype.element_ty), mask=inside)
    tl.store(grad + place, (active * u).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _turn(states, cos, sin, heads, half, BACK: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)
    inside = column < half
    first = states + row * 2 * half + column
    angle = row // heads * 2 * half + column
    a = _wide(first, inside)
    b = _wide(first + half, inside)
    c1 = _wide(cos + angle, inside)
    c2 = _wide(cos + angle + half, inside)
    s1 = _wide(sin + angle, inside)
    s2 = _wide(sin + angle + half, inside)
    if BACK:
        s1, s2 = -s2, -s1
    tl.store(first, (a * c1 - b * s1).to(states.dtype.element_ty), mask=inside)
    tl.store(first + half, (b * c2 + a * s2).to(states.dtype.element_ty), mask=inside)

"""When Lorakeet's own Triton kernels compute with a frozen weight: where they were asked for, on a CUDA device, for few tokens.

Passes over states (norms, gates, rotations) ask here too (core/fused/elementwise). A base that the kernels can read answers
`in_tiles()` (kernels/tiled_weight). Two things are made of that (kernels/triton/tiles):

    unpack     a packed weight into a dense matrix, the same bits as by torch's operations, in one pass
    product    x·Wᵀ + s·(x·Aᵀ)·Bᵀ, or g·W + s·(g·B)·A, W brought back tile by tile on the way: W is read once and never written

The second pays while W is what takes the time, which is for few tokens (`Kernels.tokens`); for more of them W is brought back
once and multiplied by cuBLAS. **Not run on a GPU yet**: the kernels were run by Triton's interpreter and compiled for cards that
were not there. So nobody gets them who does not ask.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorakeet.core.base import FrozenBase
from lorakeet.kernels.tiled_weight import TiledWeight, TritonRequest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the least of a card: bf16 on tensor cores, and what the kernels were compiled for
RANK = 64  # the highest that runs within a product: A's and B's tiles have to fit on the chip beside those of x and W


def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on `device`, and what to do, in words; empty where they can."""
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"Triton kernels run on CUDA devices, and this model is on '{device}'. Set model.kernels to torch."
    if not has_triton():
        if sys.platform != "linux":
            return "Triton is there for Linux only. Set model.kernels to torch."
        return (
            "Triton is not installed: torch for CUDA on Linux brings it. Install it with: pip install triton, or set "
            "model.kernels to torch."
        )
    return _why_not_card(device) if device.type == "cuda" else ""


def _why_not_card(device: torch.device) -> str:
    """The same for a card: the kernels were compiled for NVIDIA's since 2020 alone."""
    if torch.version.hip:
        found = f"this torch is for AMD cards (ROCm {torch.version.hip})"
    else:
        capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
        if capability >= CAPABILITY:
            return ""
        found = f"this card has {capability[0]}.{capability[1]}"
    least = ".".join(map(str, CAPABILITY))
    return f"Triton kernels need an NVIDIA card of compute capability {least} or higher; {found}. Set model.kernels to torch."


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """Of the CUDA device with that number; asked at every product."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def has_triton() -> bool:
    """Whether the package is there; it is not imported. Looked for once: every pass over states asks."""
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (its own switch TRITON_INTERPRET), as the tests do on the CPU."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def runs_on(kernels: TritonRequest | None, *tensors: Tensor) -> bool:
    """Whether the kernels are asked for and compute with such tensors; a trace's and a sharded weight's go torch's way."""
    if kernels is None or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    return not why_not(tensors[0].device)


def unpacks(base: FrozenBase, out: Tensor, buffers: Iterable[Tensor]) -> bool:
    """Whether a kernel is to bring W, in these buffers, back into `out`. Nobody looks at them unless kernels are asked for."""
    kernels: TritonRequest | None = getattr(base, "kernels", None)
    if kernels is None or not out.is_contiguous() or out.dtype not in DTYPES:
        return False
    return runs_on(kernels, out, *buffers)


def unpack(tiles: TiledWeight, out: Tensor, first: int = 0) -> Tensor:
    """Writes rows of W from `first` on into `out`, contiguous, as many numbers as it has, each rounded once; returns it."""
    from lorakeet.kernels.triton.tiles import unpack_tiles as launch

    return launch(tiles, out, first)


def product(base: FrozenBase, x: Tensor, *, transposed: bool = False) -> Tensor | None:
    """x (tokens, in) to x·Wᵀ (tokens, out); `transposed`: x (tokens, out) to x·W (tokens, in). None where torch is to do it."""
    tiles = _tiles(base, (x,))
    if tiles is None:
        return None
    from lorakeet.kernels.triton.tiles import fused_product as launch

    return launch(tiles, x, transposed=transposed)[0]


def low_rank_product(base: FrozenBase, x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """x (tokens, in), A (rank, in), B (out, rank) to y = x·Wᵀ + s·h·Bᵀ (tokens, out) and h = x·Aᵀ (tokens, rank), all of one
    dtype. None where torch is to do it.

    Both sums run in fp32; h is rounded to the dtype of x, y once at the end.
    """
    tiles = _tiles(base, (x, A, B)) if len(A) <= RANK else None
    if tiles is None:
        return None
    from lorakeet.kernels.triton.tiles import TilePair
    from lorakeet.kernels.triton.tiles import fused_product as launch

    y, shrunk = launch(tiles, x, TilePair(A, B.t(), before=1.0, after=scale))
    assert shrunk is not None
    return y, shrunk


def low_rank_product_t(base: FrozenBase, grad: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """grad g (tokens, out) to g·W + u·A (tokens, in) and u = s·g·B (tokens, rank): the way back of `low_rank_product`.

    y is linear in x, y = x·(W + s·B·A)ᵀ, so ∂L/∂x = g·(W + s·B·A) = g·W + (s·g·B)·A. That is the same computation with W read
    along its other side, Bᵀ in the place of A and A in that of Bᵀ; the scale stands before u, which ∂L/∂A = uᵀ·x needs.
    """
    tiles = _tiles(base, (grad, A, B)) if len(A) <= RANK else None
    if tiles is None:
        return None
    from lorakeet.kernels.triton.tiles import TilePair
    from lorakeet.kernels.triton.tiles import fused_product as launch

    grad_x, u = launch(tiles, grad, TilePair(B.t(), A, before=scale, after=1.0), transposed=True)
    assert u is not None
    return grad_x, u


def _tiles(base: FrozenBase, given: Iterable[Tensor]) -> TiledWeight | None:
    """The weight as the kernels read it, where a product of these tensors, x first, is to run fused."""
    x, *factors = given
    kernels: TritonRequest | None = getattr(base, "kernels", None)
    if kernels is None or not 0 < len(x) <= kernels.tokens or x.dtype not in DTYPES:
        return None
    if any(factor.dtype != x.dtype for factor in factors) or not runs_on(kernels, x, *factors):
        return None
    found: TiledWeight | None = base.in_tiles()  # type: ignore[attr-defined]
    return found if found is not None and runs_on(kernels, *found.tensors) else None

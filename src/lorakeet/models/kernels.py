"""Triton kernels for a loaded model: if they are available, which weights use them, and a check on the model's own weights.

The tests do not run on a GPU, so a model that requests the kernels first checks on its own device that they compute the same as
torch: one weight of each kind and shape, dequantised bit for bit and multiplied forwards and backwards up to rounding, for few
and more tokens, without a pair and with pairs of low and of the highest rank. Of a streamed model it checks the first block and
what is in memory. Norms, gates, rotary positions and the loss are liger-kernel's, where it is installed (kernels/liger).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.layers.linear import LoraLinear
from lorakeet.core.math import add_low_rank, shrink_grad
from lorakeet.errors import EnvironmentProblem, is_out_of_memory
from lorakeet.kernels import bitsandbytes_nf4, liger
from lorakeet.kernels.choose import fused_pair
from lorakeet.kernels.nf4_maxima import decoded_bytes
from lorakeet.kernels.proof import missing_package
from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.kernels.triton.support import RANK, has_triton, why_no_launcher, why_not_on
from lorakeet.models import modules
from lorakeet.models.families import Family
from lorakeet.models.placement import device_for
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.nf4 import Nf4Base, bitsandbytes_advice, decode_maxima_together
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec

TOKENS, LOW_RANK, SCALE = (1, 17, 33), 8, 1.5  # of the check: tokens for each tile height, and a rank beside the highest
ROWS = 256  # rows of W compared at either end
WEIGHTS = "the first rows of W", "the last rows of W"
ERROR_LENGTH = 300  # characters of Triton's message that are shown
ROUNDINGS = 4  # relative to the largest result: torch rounds an intermediate sum that the kernel does not, in another order


def kernels_for(spec: ModelSpec, device: torch.device) -> TritonRequest | None:
    """Returns the kernels of the settings, None for torch's own; EnvironmentProblem if they cannot run."""
    if spec.kernels == "torch":
        return None
    reason = why_not_on(device)
    if reason:
        raise EnvironmentProblem(f"model.kernels is triton: {reason}")
    return TritonRequest(spec.fused_tokens)


def missing_libraries(device: torch.device, quantize: QuantSpec) -> Iterator[str]:
    """Yields what a model on a GPU lacks of the libraries whose kernels come first (kernels/choose), with the command that
    installs it; nothing on other devices. What is said where bitsandbytes is not installed at all is `bitsandbytes_advice`.
    """
    if device.type != "cuda":
        return
    if why := missing_package(liger.PACKAGE, liger.VERSIONS) or (why_no_launcher() if has_triton() else ""):
        yield f"{why}. Until then norms, gates, rotary positions and the loss run by torch's operations, which is slower."
    nf4 = quantize.method == "nf4" and not bitsandbytes_advice()
    if nf4 and (why := missing_package(bitsandbytes_nf4.PACKAGE, bitsandbytes_nf4.VERSIONS)):
        yield f"{why}. Until then NF4 weights are unpacked by torch's operations, which is slower."


def with_runnable_kernels(spec: ModelSpec) -> ModelSpec:
    """Returns `spec` with torch's own kernels if its kernels cannot run here: for settings from another machine."""
    return spec if spec.kernels == "torch" or not why_not_on(device_for(spec.device)) else replace(spec, kernels="torch")


def use_kernels(model: nn.Module, kernels: TritonRequest | None) -> None:
    """Sets the kernels (None: torch's own) of every packed weight and weight with pairs."""
    for base in kernel_bases(model):
        base.kernels = kernels


def kernel_bases(model: nn.Module) -> Iterator[Any]:
    """Yields the frozen weights of `model` that can use kernels: each a PackedBase or a DenseBase."""
    for _, layer in modules.adapted_layers(model):
        if isinstance(layer, LoraLinear) and isinstance(layer.base, (PackedBase, DenseBase)):
            yield layer.base
    for _, module in modules.original_modules(model):
        if isinstance(module, PackedLinear):
            yield module.base


def share_block_maxima(model: nn.Module, family: Family) -> None:
    """Lets the NF4 weights of each decoder block decode their block maxima together, where they are on a GPU."""
    for bases in _bases_by_block(model, family):
        decode_maxima_together([base for base in bases if isinstance(base, Nf4Base) and base.device.type == "cuda"])


def shared_maxima_bytes(model: nn.Module, family: Family) -> int:
    """Bytes of the maxima that are decoded at a time there, for a model on shapes."""
    counts = [
        [-(-math.prod(base.shape) // int(base.settings["block_size"])) for base in bases if base.settings.get("double_quant")]
        for bases in _bases_by_block(model, family)
    ]
    return max(map(decoded_bytes, counts), default=0)


def _bases_by_block(model: nn.Module, family: Family) -> Iterator[list[PackedBase]]:
    """The packed weights of each decoder block."""
    prefix, count = modules.block_prefix(model, family)
    for index in range(count):
        block = modules.find(model, f"{prefix}.{index}")
        yield [module.base for module in cast(nn.Module, block).modules() if isinstance(module, PackedLinear)]


def check_kernels(parts: Iterable[nn.Module], kernels: TritonRequest, products: torch.dtype) -> None:
    """Raises EnvironmentProblem unless the kernels compute the same as torch, for one weight of each kind and shape."""
    seen = set()
    for part in parts:
        for module in part.modules():
            if isinstance(module, PackedLinear):
                base: Any = module.base
                kind, device = str(base.settings), base.device
            elif type(module) is nn.Linear:
                base = DenseBase(module)
                kind, device = f"dense {base.shape}", base.weight.device
            else:
                continue
            if kind not in seen and device.type != "meta":
                seen.add(kind)
                _check(base, kernels, products, kind, device)


@torch.no_grad()
def _check(base: Any, kernels: TritonRequest, products: torch.dtype, kind: str, device: torch.device) -> None:
    """Compares results of the kernels and of torch for one weight."""
    before, about = base.kernels, f"a weight {kind}"
    try:
        base.kernels = None
        expected = _computed(base, kernels, products, device)
        base.kernels = kernels
        with _refused(about, device):
            found = _computed(base, kernels, products, device)
    finally:
        base.kernels = before
    rounding = ROUNDINGS * (torch.finfo(products).eps + max(base.shape) ** 0.5 * torch.finfo(torch.float32).eps)
    for name, mine in found.items():
        _compare(name, about, mine, expected[name], 0.0 if name.startswith(WEIGHTS) else rounding)


@contextmanager
def _refused(about: str, device: torch.device) -> Iterator[None]:
    """A context that turns errors of compiling and launching into EnvironmentProblem, but for running out of memory."""
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises the error of a kernel that failed after its launch
    except Exception as error:  # of many types: TritonError is only an Exception
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:ERROR_LENGTH] or "no message"
        raise EnvironmentProblem(
            f"Lorakeet's Triton kernels do not run on this device, for {about} ({type(error).__name__}: {reason.rstrip('.')}). "
            "Set model.kernels to torch, and please report it."
        ) from error


def _compare(name: str, about: str, mine: Tensor, theirs: Tensor, rounding: float) -> None:
    """Raises EnvironmentProblem if they differ by more than `rounding`, relative to the largest number."""
    worst = float((mine.float() - theirs.float()).abs().max())
    allowed = rounding * float(theirs.float().abs().max())
    if not worst <= allowed:
        raise EnvironmentProblem(
            f"Lorakeet's Triton kernels compute {name} differently from torch on this device, for {about}: the "
            f"largest difference is {worst:.3g}, where rounding explains {allowed:.3g}. Set model.kernels to torch, and "
            "please report it."
        )


def checked_products(kernels: TritonRequest) -> list[tuple[int, int]]:
    """Returns tokens and rank (0: no pair) of the checked products: a launch for each tile height up to the fused tokens.

    The highest rank, which needs most of the chip, is checked with the most tokens.
    """
    counts = sorted({min(count, kernels.tokens) for count in TOKENS} - {0})
    return [(count, rank) for count in counts for rank in (0, LOW_RANK)] + [(count, RANK) for count in counts[-1:]]


def _computed(base: Any, kernels: TritonRequest, products: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Returns products of fixed numbers with the base, without a pair and with one, forwards and backwards; of a packed base also
    rows of W at both ends, in `products` and in fp32."""
    out, inner = base.shape
    named: dict[str, Tensor] = {}
    results: tuple[Tensor, ...]
    names: tuple[str, ...]
    for tokens, rank in checked_products(kernels):
        x, grad = (_numbers(tokens, width, device).to(products) for width in (inner, out))
        if rank:
            a = (_numbers(rank, inner, device) / inner**0.5).to(products)
            b = (_numbers(out, rank, device) / rank).to(products)
            results = (*_with_pair(base, x, a, b), *_with_pair(base, grad, a, b, back=True))
            names = "y", "x·Aᵀ", "∂L/∂x", "s·g·B"
        elif isinstance(base, PackedBase):
            results, names = (base.matmul(x), base.matmul_t(grad)), ("x·Wᵀ", "g·W")
        else:
            continue  # torch multiplies a dense weight without a pair
        case = f"tokens {tokens}, rank {rank}"
        named.update({f"{name} ({case})": found for name, found in zip(names, results, strict=True)})
    if isinstance(base, PackedBase):
        last = max(0, out - ROWS) // base.row_step * base.row_step
        for dtype in sorted({products, torch.float32}, key=str):
            for name, first, stop in zip(WEIGHTS, (0, last), (min(out, ROWS), out), strict=True):
                rows = torch.empty((stop - first, inner), dtype=dtype, device=device)
                named[f"{name} in {str(dtype).removeprefix('torch.')}"] = base.unpack(rows, first)
    return named


def _with_pair(base: Any, x: Tensor, a: Tensor, b: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the product of x with W and a pair, forwards or `back`, and the rank-sized product: by a kernel, else by torch."""
    found = fused_pair(base, x, a, b, SCALE, back=back)
    if found is not None:
        return found
    if back:
        u = shrink_grad(x, b, SCALE)
        return base.matmul_t(x).addmm_(u, a), u
    shrunk = torch.mm(x, a.t())
    return add_low_rank(base.matmul(x), shrunk, b, SCALE), shrunk


def _numbers(rows: int, columns: int, device: torch.device) -> Tensor:
    """Returns normal fp32 numbers (rows, columns), the same on every machine."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(device)

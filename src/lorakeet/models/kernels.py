"""Triton kernels for a loaded model: whether they can be had, which weights use them, and a proof on the model's own weights.

No test here ran on a GPU, so a model that asks for them shows on its own device that they compute what torch computes, before
they are used: one weight of each kind and shape, brought back bit for bit, multiplied forwards and backwards to rounding, by few
and by more tokens, without a pair and with pairs of low and of the highest rank; the passes between products; and the loss over
the model's words. Of a model whose blocks are streamed that is its first block, and what is not streamed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.fused.attention import rotated
from lorakeet.core.fused.mlp_and_norm import FrozenRmsNorm, recomputed, rms_norm, rms_norm_backward
from lorakeet.core.layers.linear import LoraLinear
from lorakeet.core.math import add_low_rank, shrink_grad
from lorakeet.core.triton_products import low_rank_product, low_rank_product_t
from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels.choose import elementwise_ops
from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.kernels.triton.support import RANK, why_not_on
from lorakeet.models import modules
from lorakeet.models.placement import device_for
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.packed import PackedBase, PackedLinear

TOKENS, LOW, SCALE = (1, 17, 33), 8, 1.5  # of the proof: tokens for each height of a tile, and a low rank beside the highest
ROWS = 256  # of W that are compared at either end
WEIGHTS = "the first rows of W", "the last rows of W"
LOSS_ROWS, LOSS_ROUNDINGS = 3, 16  # of fp32: sums over the vocabulary, in another order
PASS_ROWS, PASS_EPSILON = 5, 1e-6  # tokens of the proof of passes, and ε of their norm
SAID = 300  # characters of what Triton said
ROUNDINGS = 4  # relative to the largest result: torch rounds a sum on the way that the kernel does not, and adds in another order


def kernels_for(spec: ModelSpec, device: torch.device) -> TritonRequest | None:
    """The kernels that the settings ask for, None for torch's own; EnvironmentProblem where they cannot run."""
    if spec.kernels == "torch":
        return None
    reason = why_not_on(device)
    if reason:
        raise EnvironmentProblem(f"model.kernels is triton: {reason}")
    return TritonRequest(spec.fused_tokens)


def with_runnable_kernels(spec: ModelSpec) -> ModelSpec:
    """`spec` with torch's own kernels where those that it asks for cannot run: for settings that were made on another machine."""
    return spec if spec.kernels == "torch" or not why_not_on(device_for(spec.device)) else replace(spec, kernels="torch")


def use_kernels(model: nn.Module, kernels: TritonRequest | None) -> None:
    """Lets every packed weight, every weight that carries pairs, and every norm that stands for a frozen one (once models/fuse
    has put them in) use the kernels; None: none of them. Gates and rotations ask their weights."""
    for base in kernel_bases(model):
        base.kernels = kernels
    for module in model.modules():
        if isinstance(module, FrozenRmsNorm):
            module.kernels = kernels


def kernel_bases(model: nn.Module) -> Iterator[Any]:
    """The frozen weights of `model` that could: each a PackedBase or a DenseBase."""
    for _, layer in modules.adapted_layers(model):
        if isinstance(layer, LoraLinear) and isinstance(layer.base, (PackedBase, DenseBase)):
            yield layer.base
    for _, module in modules.original_modules(model):
        if isinstance(module, PackedLinear):
            yield module.base


def check_kernels(parts: Iterable[nn.Module], kernels: TritonRequest, products: torch.dtype) -> None:
    """EnvironmentProblem unless the kernels compute on these modules what torch does, over one weight of each kind and shape."""
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
    """Computes everything by torch and by the kernels, and compares."""
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


@torch.no_grad()
def check_loss(vocabulary: int, device: torch.device) -> None:
    """EnvironmentProblem unless the kernel of the loss gives torch's losses and gradients for so many words."""
    logits = _numbers(LOSS_ROWS, vocabulary, device)
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1], device=device)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    gradient = logits.softmax(1)
    gradient[torch.arange(LOSS_ROWS, device=device), targets] -= 1
    about = f"{vocabulary} words"
    with _refused(about, device):
        from lorakeet.kernels.triton.loss import loss_in_place

        found = loss_in_place(logits, targets, wants_grad=True)
    rounding = LOSS_ROUNDINGS * torch.finfo(torch.float32).eps
    _compare("the loss", about, found, losses, rounding)
    _compare("the gradient of the loss", about, logits, gradient, rounding)


@torch.no_grad()
def check_elementwise(widths: Iterable[int], kernels: TritonRequest, dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """EnvironmentProblem unless the kernels make the passes between products as torch's operations do, over rows of these widths
    in these dtypes."""
    for width, dtype in itertools.product(widths, dtypes):
        about = f"rows of {width} numbers in {str(dtype).removeprefix('torch.')}"
        expected = _passed(None, width, dtype, device)
        with _refused(about, device):
            found = _passed(kernels, width, dtype, device)
        for name, mine in found.items():
            _compare(name, about, mine, expected[name], ROUNDINGS * torch.finfo(dtype).eps)


def _passed(kernels: TritonRequest | None, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """What norms, gates and, over an even width, rotations make of numbers that are always the same."""
    x, up, grad, gain = (_numbers(PASS_ROWS + number, width, device)[:PASS_ROWS].to(dtype) for number in range(4))
    y, rho = rms_norm(x, gain[0], PASS_EPSILON, kernels)
    found = {
        "a norm": y,
        "a norm again": recomputed((x, rho, gain[0]), kernels),
        "the gradient of a norm": rms_norm_backward(grad, x, rho, gain[0], kernels),
    }
    by = None if kernels is None else elementwise_ops(x, up, grad, triton=kernels)
    if by is None:
        part = x.float().sigmoid()
        active = x.float() * part
        inner, of_up = active * up, grad * active
        of_gate = grad.float() * up * (part + active * (1 - part))
    else:
        of_gate, of_up = x.clone(), up.clone()
        by.gated_backward_(of_gate, of_up, grad.clone())
        inner = by.gated(x, up)
    found |= {"a gate": inner, "the gradient of a gate": of_gate, "the gradient of what is gated": of_up}
    for back in (False, True) if width % 2 == 0 else ():
        states = _numbers(2 * PASS_ROWS, width, device).to(dtype).view(PASS_ROWS, 2, width)
        cos, sin = (_numbers(PASS_ROWS + number, width, device)[:PASS_ROWS].to(dtype) for number in range(2))
        found[f"a rotation{' back' * back}"] = rotated(states, cos, sin, back=back, kernels=kernels)
    return found


@contextmanager
def _refused(about: str, device: torch.device) -> Iterator[None]:
    """Whatever is raised where Triton cannot compile or launch becomes an EnvironmentProblem; memory that is out stays that."""
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # where a kernel that was launched and failed says so
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: Triton's TritonError derives from nothing else
        said = " ".join(str(error).split())[:SAID] or "no message"
        raise EnvironmentProblem(
            f"Lorakeet's Triton kernels do not run on this device, for {about} ({type(error).__name__}: {said.rstrip('.')}). "
            "Set model.kernels to torch, and please report it."
        ) from error


def _compare(name: str, about: str, mine: Tensor, theirs: Tensor, rounding: float) -> None:
    """EnvironmentProblem where they differ by more than `rounding`, relative to the largest number."""
    worst = float((mine.float() - theirs.float()).abs().max())
    allowed = rounding * float(theirs.float().abs().max())
    if not worst <= allowed:
        raise EnvironmentProblem(
            f"Lorakeet's Triton kernels compute {name} otherwise than torch on this device, for {about}: the "
            f"largest difference is {worst:.3g}, where rounding explains {allowed:.3g}. Set model.kernels to torch, and "
            "please report it."
        )


def proved_products(kernels: TritonRequest) -> list[tuple[int, int]]:
    """Tokens and rank of the products that are proved, rank 0 without a pair: a launch of each height, no longer than fused.

    The highest rank, which wants most of the chip, is proved with the most of these tokens.
    """
    counts = sorted({min(count, kernels.tokens) for count in TOKENS} - {0})
    return [(count, rank) for count in counts for rank in (0, LOW)] + [(count, RANK) for count in counts[-1:]]


def _computed(base: Any, kernels: TritonRequest, products: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Rows of W at both ends of a packed base, in `products` and in fp32, and its products without a pair and with one, forwards
    and backwards, for numbers that are always the same."""
    out, inner = base.shape
    named: dict[str, Tensor] = {}
    results: tuple[Tensor, ...]
    names: tuple[str, ...]
    for tokens, rank in proved_products(kernels):
        x, grad = (_numbers(tokens, width, device).to(products) for width in (inner, out))
        if rank:
            a = (_numbers(rank, inner, device) / inner**0.5).to(products)
            b = (_numbers(out, rank, device) / rank).to(products)
            results = (*_forwards(base, x, a, b), *_backwards(base, grad, a, b))
            names = "y", "x·Aᵀ", "∂L/∂x", "s·g·B"
        elif isinstance(base, PackedBase):
            results, names = (base.matmul(x), base.matmul_t(grad)), ("x·Wᵀ", "g·W")
        else:
            continue  # a plain weight without a pair is multiplied by torch
        case = f"tokens {tokens}, rank {rank}"
        named.update({f"{name} ({case})": found for name, found in zip(names, results, strict=True)})
    if isinstance(base, PackedBase):
        last = max(0, out - ROWS) // base.row_step * base.row_step
        for dtype in sorted({products, torch.float32}, key=str):
            for name, first, stop in zip(WEIGHTS, (0, last), (min(out, ROWS), out), strict=True):
                rows = torch.empty((stop - first, inner), dtype=dtype, device=device)
                named[f"{name} in {str(dtype).removeprefix('torch.')}"] = base.unpack(rows, first)
    return named


def _forwards(base: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    found = low_rank_product(base, x, a, b, SCALE)
    if found is not None:
        return found
    shrunk = torch.mm(x, a.t())
    return add_low_rank(base.matmul(x), shrunk, b, SCALE), shrunk


def _backwards(base: Any, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    found = low_rank_product_t(base, grad, a, b, SCALE)
    if found is not None:
        return found
    u = shrink_grad(grad, b, SCALE)
    return base.matmul_t(grad).addmm_(u, a), u


def _numbers(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) of normal fp32 numbers, the same on every machine."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(device)

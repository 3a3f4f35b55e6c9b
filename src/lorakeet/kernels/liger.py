"""Elementwise ops of a block, and the loss over a vocabulary, by the kernels of liger-kernel on a CUDA GPU.

**Lorakeet has not run on a GPU yet**, but thousands run these kernels (https://arxiv.org/abs/2410.10989, BSD 2-Clause): RMSNorm,
the gates of SwiGLU and GeGLU, rotary positions, cross-entropy. Formulas are those of kernels/cpu/elementwise and train/text/loss.
Its own functions around the kernels of rotation, loss and a norm's backward pass are not called: they wait for the GPU, need
queries beside keys, or fill with zeros what the kernel writes.

Before the first call for a dtype and width, and for a number of heads, made-up rows are computed by the kernel and by torch: more
rows than the GPU has processors, over which a norm's backward pass loops. Each number may differ by roundings of its own terms.
Where one differs by more, or the kernel does not run, one warning says so, and torch computes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from lorakeet.kernels.proof import difference_found, missing_package
from lorakeet.kernels.protocol import Situation
from lorakeet.kernels.triton_support import are_numbers, has_triton, why_not_compiled

PACKAGE, VERSIONS = "liger-kernel", SpecifierSet(">=0.8.5,<0.9")
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEEDS = "contiguous states of one dtype, rows that agree with torch's"
WIDEST = 1 << 16  # numbers of a row that a program has at once
COLUMNS = 1 << 15  # of a row of logits at once, as liger-kernel has it
WARPS = 32  # of a program of the loss, over fp32 logits
TILED = False  # the logits
LLAMA = 0  # the casts of a norm: x·ρ is rounded before its gain
ROWS, EPSILON = 7, 1e-6  # of the proof
ROUNDINGS, GATE_ROUNDINGS = 4, 2  # of a number's terms, that explain a difference; those of gates are two
WIDE_ROUNDINGS = 16  # of fp32, relative to the largest term: of sums in another order, and of exponentials
SPREAD = 2.0  # of gates: the two approximations of GELU part where it is small


def why_not(situation: Situation) -> str:
    """Why the kernels do not run in a situation, with the remedy where there is one."""
    if situation.device.type not in DEVICES:
        return "it is a kernel for CUDA GPUs"
    if situation.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16; states are {str(situation.dtype).removeprefix('torch.')}"
    if not situation.c:
        return "torch's own operations alone compute in this thread"
    if not has_triton():
        return "Triton is not installed: torch for CUDA on Linux brings it"
    return missing_package(PACKAGE, VERSIONS) or why_not_compiled(situation.device, situation.dtype)


def takes(states: Sequence[Tensor], _: int, by_rows: bool) -> bool:
    """Contiguous states of one dtype, for which the kernel has proved to compute what torch does."""
    first = states[0]
    if not first.numel() or any(each.dtype != first.dtype or not each.is_contiguous() for each in states):
        return False
    if not are_numbers(*states) or first.shape[-1] > WIDEST:
        return False
    kind = "norm" if by_rows else "rotation" if first.dim() == 3 and states[1].dim() == 2 else "gates"
    width = first.shape[-1]
    heads = first.shape[1] if kind == "rotation" else 1
    return (kind != "rotation" or width % 2 == 0) and computes_the_same(kind, first.device, first.dtype, width, heads)


def takes_loss(hidden: Tensor, vocabulary: int) -> bool:
    """Plain states, and a vocabulary for which the kernel has proved to compute what torch does."""
    return are_numbers(hidden) and computes_the_same("loss", hidden.device, torch.float32, vocabulary)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y = w ∘ (x·ρ) and ρ = 1/√(mean(x²) + ε) (…, 1) in fp32, of x (…, width) and w (width,)."""
    from liger_kernel.ops.rms_norm import rms_norm_forward

    y, _, rho, *_ = rms_norm_forward(x, weight, epsilon, 0.0, LLAMA, True)
    return y, rho.view(*x.shape[:-1], 1)


def norm_again(x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """Recomputes the y of `norm`, to the last bit, from its ρ. Two of torch's operations: liger-kernel has none for it."""
    return torch.mul(x, rho, out=torch.empty_like(x)).mul_(weight)


def norm_backward(grad: Tensor, x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)), x̂ = x·ρ."""
    from liger_kernel.ops.rms_norm import _rms_norm_backward_kernel
    from liger_kernel.ops.utils import calculate_settings, device_context, torch_to_triton_dtype

    width, found = x.shape[-1], torch.empty_like(grad)
    rows, (block, warps) = x.numel() // width, calculate_settings(width)
    programs = _programs(x.device)
    with device_context(x.device):  # its own function fills ∂x with zeros before, which the kernel overwrites
        _rms_norm_backward_kernel[(programs,)](
            grad, width, found, width, x, width, torch_to_triton_dtype[x.dtype], weight, weight.stride(0), rho, 1, None, 0, rows,
            width, 0.0, -(-rows // programs), LLAMA, elementwise_affine=True, BLOCK_SIZE=block, COMPUTE_DW=False, num_warps=warps,
        )  # fmt: skip
    return found


def _programs(device: torch.device) -> int:
    """Of a norm's backward pass: one for each processor of a GPU, which loops over rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up."""
    from liger_kernel.ops.swiglu import swiglu_forward

    return swiglu_forward(gate, up)[2]  # type: ignore[no-any-return]


def gated_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    """Overwrites gate and up with their gradients, from the gradient of `gated`, whose result is returned."""
    from liger_kernel.ops.swiglu import swiglu_backward

    inner = gated(gate, up)
    swiglu_backward(gate, up, grad)
    return inner


def gelu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) ∘ up, by the approximation with tanh."""
    from liger_kernel.ops.geglu import geglu_forward

    return geglu_forward(gate, up)[2]  # type: ignore[no-any-return]


def gelu_gated_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    """`gated_backward_` of `gelu_gated`."""
    from liger_kernel.ops.geglu import geglu_backward

    inner = gelu_gated(gate, up)
    geglu_backward(gate, up, grad)
    return inner


def rotate_(states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Rotates (tokens, heads, head) by the angles (tokens, head), or back, in place: core/fused/attention.rotated.

    The halves of cos and of sin are equal, as in every model with rotary positions: the kernel reads the first ones.
    """
    from liger_kernel.ops.rope import _triton_rope
    from liger_kernel.ops.utils import device_context

    tokens, heads, head = states.shape
    padded, width = 1 << (heads - 1).bit_length(), 1 << (head - 1).bit_length()
    with device_context(states.device):  # queries are the states, and there are no heads of keys
        _triton_rope[(tokens,)](
            states, states.stride(0), states, states.stride(0), cos, cos.stride(0), sin, sin.stride(0), tokens, 1, 1, heads, 0,
            head, padded, 1, width, width, head, BLOCK_SIZE=padded, BACKWARD_PASS=back,
        )  # fmt: skip


def loss_in_place(logits: Tensor, targets: Tensor, *, wants_grad: bool) -> Tensor:
    """Logits z (n, vocabulary), fp32, rows contiguous, and targets (n,) within it, to the losses (n,); z becomes ∂L/∂z if wanted.

    The function of liger-kernel that launches this reads the number of targets from the GPU; here all of them count.
    """
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.utils import device_context

    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows)
    targets = targets.contiguous()
    if rows:
        with device_context(logits.device):
            liger_cross_entropy_kernel[(rows,)](
                X_ptr=logits, X_stride=logits.stride(0), Y_ptr=targets, Y_stride=1, weight_ptr=None, loss_ptr=losses,
                z_loss_ptr=None, loss_stride=1, token_accuracy_ptr=None, token_accuracy_stride=0, predicted_tokens_ptr=None,
                predicted_tokens_stride=0, n_cols=vocabulary, n_non_ignore=rows, sum_non_ignore_weight=rows, weight_sum=0.0,
                ignore_index=-1, lse_square_scale=0.0, label_smoothing=0.0, reduction="none", softcap=None, RETURN_Z_LOSS=False,
                RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False,
                BLOCK_SIZE=min(COLUMNS, 1 << (vocabulary - 1).bit_length()), HAS_WEIGHT=False, HAS_SOFTCAPPING=False,
                HAS_GRADIENTS=wants_grad, num_warps=WARPS,
            )  # fmt: skip
    return losses


# The proof.


@functools.cache
def computes_the_same(kind: str, device: torch.device, dtype: torch.dtype, width: int, heads: int = 1) -> bool:
    """True if the kernels of a kind compute made-up rows, of `heads` times `width` numbers, as torch does; else one warning says
    how not."""
    said = difference_found(lambda: next(iter(_PROOFS[kind](device, dtype, width, heads)), ""), of_any_kind=True)
    if said:
        logging.getLogger("lorakeet").warning(
            "%s's kernel for %s of %d numbers %s. Torch computes instead, which is slower. Please report it.",
            PACKAGE, {"norm": "norms", "loss": "losses"}.get(kind, kind), width, said,
        )  # fmt: skip
    return not said


def _numbers(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _difference(name: str, mine: Tensor, theirs: Tensor, terms: Tensor, rounding: float) -> list[str]:
    """What is to be said if a number differs from the expected one by more than `rounding` of its `terms`, their absolute sum.

    Relative to the largest number of all, as it was, 0.29 was allowed of GeGLU in bf16; its two approximations differ by 0.0016.
    """
    wide = WIDE_ROUNDINGS * torch.finfo(torch.float32).eps * terms.max()
    far = (mine.float() - theirs).abs()
    if bool((far <= rounding * terms + wide).all()):
        return []
    worst = int(torch.where(far.isnan(), torch.inf, far - rounding * terms).argmax())
    found, allowed = (float(each.flatten()[worst]) for each in (far, rounding * terms + wide))
    return [f"differs from torch in {name}: by {found:.3g}, where rounding explains {allowed:.3g}"]


def _norm_rows(device: torch.device) -> Tensor:
    """The made-up row that each row of a norm has: more rows than programs, each of which then computes several."""
    return torch.arange(2 * _programs(device) + 3, device=device) % ROWS


def _norms(device: torch.device, dtype: torch.dtype, width: int, _: int) -> list[str]:
    x, grad = (_numbers((ROWS, width), device, dtype, seed) for seed in (1, 2))
    weight, rows = _numbers((width,), device, dtype, 3), _norm_rows(device)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    normal, scaled = wide * scale, grad.float() * weight.float()
    mean = (scaled * normal).mean(-1, keepdim=True)
    expected, back = weight.float() * normal, (scaled - normal * mean) * scale
    spread = (scaled * normal).abs().mean(-1, keepdim=True)  # of a sum whose terms are rounded before
    terms = (scaled.abs() + normal.abs() * spread) * scale
    x, grad = x[rows], grad[rows]
    y, rho = norm(x, weight, EPSILON)
    found = norm_backward(grad, x, rho, weight)
    rounding = ROUNDINGS * torch.finfo(dtype).eps
    said = _difference("a norm", y, expected[rows], expected.abs()[rows], rounding)
    said += _difference("∂x of a norm", found, back[rows], terms[rows], rounding)
    return said + (
        [] if torch.equal(norm_again(x, rho, weight), y) else ["does not give the same bits when a norm is computed again"]
    )


def _gates(device: torch.device, dtype: torch.dtype, width: int, _: int) -> list[str]:
    gate, up, grad = (_numbers((ROWS, width), device, dtype, seed) * by for seed, by in ((4, SPREAD), (5, 1.0), (6, 1.0)))
    ways: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = [
        ("silu", gated, gated_backward_, torch.nn.functional.silu),
        ("gelu", gelu_gated, gelu_gated_backward_, functools.partial(torch.nn.functional.gelu, approximate="tanh")),
    ]
    said = []
    for name, forward, backward, activation in ways:
        with torch.enable_grad():
            leaves = [each.float().requires_grad_() for each in (gate, up)]
            result = activation(leaves[0]) * leaves[1]
            of_gate, of_up = torch.autograd.grad(result, leaves, grad.float())
        mine, expected = (gate.clone(), up.clone()), result.detach()
        inner = backward(*mine, grad.clone())
        for what, found, theirs in (
            (f"{name}(z)∘u", forward(gate, up), expected), (f"{name}(z)∘u again", inner, expected),
            (f"∂z of {name}", mine[0], of_gate), (f"∂u of {name}", mine[1], of_up),
        ):  # fmt: skip
            said += _difference(what, found, theirs, theirs.abs(), GATE_ROUNDINGS * torch.finfo(dtype).eps)
    return said


def _rotations(device: torch.device, dtype: torch.dtype, width: int, heads: int) -> list[str]:
    states = _numbers((ROWS, heads, width), device, dtype, 7)
    angles = _numbers((ROWS, width // 2), device, torch.float32, 8)
    cos, sin = (torch.cat([each, each], -1).to(dtype) for each in (angles.cos(), angles.sin()))
    said = []
    for back in (False, True):
        mine = states.clone()
        rotate_(mine, cos, sin, back)
        c, s = (each.float()[:, None, : width // 2] for each in (cos, -sin if back else sin))
        a, b = states.float().split(width // 2, dim=-1)  # type: ignore[no-untyped-call]
        expected = torch.cat([a * c - b * s, b * c + a * s], -1)
        terms = torch.cat([(a * c).abs() + (b * s).abs(), (b * c).abs() + (a * s).abs()], -1)
        said += _difference(f"a rotation{' back' * back}", mine, expected, terms, ROUNDINGS * torch.finfo(dtype).eps)
    return said


def _losses(device: torch.device, _: torch.dtype, vocabulary: int, __: int) -> list[str]:
    logits = _numbers((3, vocabulary), device, torch.float32, 9) * 4
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1], device=device)
    wide = logits.double()  # torch's own sums over a vocabulary are as far off in fp32
    expected = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    slope = wide.softmax(1)
    slope[torch.arange(3, device=device), targets] -= 1
    alone = loss_in_place(logits.clone(), targets, wants_grad=False)
    found = loss_in_place(logits, targets, wants_grad=True)
    rounding = WIDE_ROUNDINGS * torch.finfo(torch.float32).eps
    named = [("a loss", found, expected), ("a loss without gradient", alone, expected), ("∂z of a loss", logits, slope)]
    return [line for name, mine, theirs in named for line in _difference(name, mine, theirs, theirs.abs(), rounding)]


_PROOFS: dict[str, Callable[[torch.device, torch.dtype, int, int], list[str]]] = {
    "norm": _norms, "gates": _gates, "rotation": _rotations, "loss": _losses,
}  # fmt: skip

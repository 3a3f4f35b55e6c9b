"""One table of kernels: for each task the kernels in order of preference. The first one that can run, runs.

The code asks it (`candidates` and the functions below), `lorakeet doctor` prints it (`passed_over`), and a run's report records
what it chose (`in_words`). A new kernel is a file in kernels/cpu or kernels/triton that offers what kernels/protocol says, and a
line here. Kernels without a source are torch's own operations, which core writes out where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorakeet.kernels import flash_varlen, onednn
from lorakeet.kernels.cpu import (
    attention,
    dense,
    head,
    inference_pairs,
    int8_rows,
    operators,
    panels,
    stored,
    trained_block,
    trained_pairs,
)
from lorakeet.kernels.device import REHEARSED
from lorakeet.kernels.protocol import DenseProducts, ElementwiseOps, Kernel, LowRankProducts, Situation
from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.kernels.triton import support

_C, _TRITON = "lorakeet.kernels.cpu.", "lorakeet.kernels.triton."


def _always(_: Situation) -> str:
    return ""


def _not_on_the_cpu(situation: Situation) -> str:
    on_cpu = situation.device.type == "cpu" and not situation.rehearsed
    return "" if on_cpu else "it is a kernel for the CPU"


def _products_not_narrow(situation: Situation) -> str:
    if reason := _not_on_the_cpu(situation):
        return reason
    narrow = situation.products == situation.dtype != torch.float32
    return "" if narrow else "matrix products run in another dtype than the states', or in float32"


TORCH = Kernel("torch", _always)
BATCHED_ROWS = Kernel("torch: batched products", _products_not_narrow)
CPU_FLASH_ROWS = Kernel("torch: CPU flash attention in float32", _not_on_the_cpu)
ROW_BY_ROW = Kernel("torch: row by row", _always)
C_ROWS = Kernel("C: attention.c", attention.why_not, attention.takes, attention.NEEDS, _C + "attention:NativeRows")
C_PANELS = Kernel("C: panels.c", panels.why_not, panels.takes, panels.NEEDS, _C + "panels:Panels")

TABLE: dict[str, tuple[Kernel, ...]] = {
    "decoder block, training": (
        Kernel("C: trained_block.c", dense.why_not, None, trained_block.NEEDS, _C + "trained_block"),
        Kernel("separate kernels", _always),
    ),
    "attention": (
        C_ROWS,
        Kernel("torch: flash varlen", flash_varlen.why_not, flash_varlen.takes, flash_varlen.NEEDS,
               "lorakeet.kernels.flash_varlen:FlashVarlen"),
        BATCHED_ROWS,
        CPU_FLASH_ROWS,
        ROW_BY_ROW,
    ),
    "elementwise ops": (
        Kernel("C: elementwise.c", operators.why_not, operators.takes, operators.NEEDS, _C + "elementwise"),
        Kernel("Triton: elementwise", support.why_not, support.takes_states, "contiguous states of one dtype",
               _TRITON + "elementwise"),
        TORCH,
    ),
    "product, dense weight": (
        Kernel("C: dense.c", dense.why_not, dense.takes, dense.NEEDS, _C + "dense"),
        TORCH,
    ),
    "product, quantised weight": (
        Kernel("Triton: tiles", support.why_not, support.takes_rows, "few tokens (model.fused_tokens)", _TRITON + "tiles"),
        Kernel("C: stored.c", stored.why_not, stored.takes, stored.NEEDS, _C + "stored"),
        Kernel("torch, on the dequantised weight", _always),
    ),
    "product in int8": (
        Kernel("C: int8_rows.c", int8_rows.why_not, int8_rows.takes, int8_rows.NEEDS, _C + "int8_rows"),
        TORCH,
    ),
    "dequantise": (
        Kernel("Triton: tiles", support.why_not, support.takes_tiles, "contiguous results", _TRITON + "tiles"),
        Kernel("C: stored.c", stored.why_not_dequantise, stored.takes_buffers, stored.READABLE, _C + "stored"),
        TORCH,
    ),
    "product and pair in one": (
        Kernel("Triton: tiles", support.why_not, support.takes_rows, f"few tokens, ranks up to {support.RANK}",
               _TRITON + "tiles"),
        Kernel("separate kernels", _always),
    ),
    "low-rank pairs, training": (
        Kernel("C: trained_pairs.c", operators.why_not, trained_pairs.takes, trained_pairs.NEEDS, _C + "trained_pairs"),
        TORCH,
    ),
    "low-rank pairs, inference": (
        Kernel("C: pairs.c", operators.why_not, inference_pairs.takes, inference_pairs.NEEDS, _C + "inference_pairs"),
        TORCH,
    ),
    "dense weights, inference": (
        C_PANELS,
        Kernel("oneDNN's layout", onednn.why_not, onednn.takes, onednn.NEEDS, "lorakeet.kernels.onednn:OneDnnOrder"),
        Kernel("torch, in the stored layout", _always),
    ),
    "loss of the head": (
        Kernel("Triton: loss", support.why_not, support.takes_loss, "float32 logits", _TRITON + "loss"),
        Kernel("C: head.c", head.why_not, head.takes, head.NEEDS, _C + "head"),
        TORCH,
    ),
}  # fmt: skip

CANDIDATES: dict[tuple[object, ...], tuple[Kernel, ...]] = {}  # by task and Situation


def candidates(
    task: str, device: torch.device, dtype: torch.dtype, products: torch.dtype | None = None, *, triton: bool = False
) -> tuple[Kernel, ...]:
    """The kernels that can run, in order; the last one takes every call. `products` None: the dtype of the states."""
    key = task, device, dtype, products, triton, operators.ENABLED.get(), REHEARSED.get()
    found = CANDIDATES.get(key)
    if found is None:
        situation = Situation(device, dtype, products or dtype, triton, operators.ENABLED.get(), REHEARSED.get())
        found = CANDIDATES[key] = tuple(kernel for kernel in TABLE[task] if not kernel.why_not(situation))
    return found


def first_of(kernels: Iterable[Kernel], *facts: object) -> Kernel:
    """The first kernel that takes a call with these facts."""
    for kernel in kernels:
        if kernel.takes is None or kernel.takes(*facts):
            return kernel
    raise AssertionError("the last kernel of a task must take everything")


def elementwise_ops(
    *states: Tensor, triton: TritonRequest | None = None, width: int = operators.LANES, by_rows: bool = False
) -> ElementwiseOps | None:
    """The kernel for elementwise ops over states of one dtype; None: torch.

    C needs last dimensions in multiples of `width`. `by_rows`: for norms, which need a whole row at once.
    """
    first = states[0]
    kernels = candidates("elementwise ops", first.device, first.dtype, triton=triton is not None)
    found: ElementwiseOps | None = first_of(kernels, states, width, by_rows).load()
    return found


def dense_products(x: Tensor, weight: Tensor) -> DenseProducts | None:
    """The kernel for x (tokens, ·) times a frozen weight (out, in) of its dtype; None: torch."""
    found: DenseProducts | None = first_of(candidates("product, dense weight", x.device, x.dtype), x, weight).load()
    return found


def multiplies_stored(x: Tensor) -> bool:
    """True if C multiplies x (tokens, ·) with quantised weights as they are stored."""
    kernels = candidates("product, quantised weight", x.device, x.dtype)
    return first_of(kernels, x).load() is stored


def quantises_in_c(x: Tensor) -> bool:
    """True if C quantises x (tokens, width) to int8 and multiplies it with int8 weights."""
    return first_of(candidates("product in int8", x.device, x.dtype), x).load() is int8_rows


def low_rank_products(
    products: torch.dtype, states: Sequence[Tensor], factors: Sequence[Tensor], places: Sequence[int]
) -> LowRankProducts | None:
    """The kernel for pairs in training, on `states` (x, and the y's), in one call; None: torch, part by part."""
    kernels = candidates("low-rank pairs, training", states[0].device, products)
    found: LowRankProducts | None = first_of(kernels, states, factors, places).load()
    return found


def copies_pairs(products: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int]]) -> bool:
    """True if C adds copies of pairs to layers with weights of `shapes` (out, in), for inference."""
    return first_of(candidates("low-rank pairs, inference", device, products), shapes).load() is inference_pairs


def packed_rows(  # noqa: PLR0917 - the states' dtype and shape, and the rows
    like: Tensor, products: torch.dtype, heads: int, kv: int, d: int, rows: Sequence[int], prefix: int
) -> Kernel:
    """The kernel for causal attention of packed rows, with states like `like`, in `heads` heads of d numbers, `kv` of keys."""
    return first_of(candidates("attention", like.device, like.dtype, products), like, heads, kv, d, rows, prefix)


def attends_in_c(dtype: torch.dtype, products: torch.dtype, d: int, device: torch.device) -> bool:
    """True if C computes attention with heads of d numbers, for rows that are long enough (kernels/cpu/attention.TILED)."""
    return C_ROWS in candidates("attention", device, dtype, products) and d % operators.HEAD == 0


def inference_layout(weight: Tensor) -> Kernel:
    """The layout of a dense weight (out, in) for products of few tokens; its source takes the weight, unless it is torch's."""
    return first_of(candidates("dense weights, inference", weight.device, weight.dtype), weight)


def loss_kernel(hidden: Tensor, dtype: torch.dtype, triton: TritonRequest | None) -> Kernel:
    """The kernel for losses of hidden states (tokens, hidden) under a head of that dtype."""
    kernels = candidates("loss of the head", hidden.device, hidden.dtype, dtype, triton=triton is not None)
    return first_of(kernels, hidden)


def passed_over(task: str, situation: Situation) -> tuple[Kernel, list[tuple[Kernel, str]]]:
    """The kernel that a task uses in a situation, and the ones before it in the table, each with the reason."""
    skipped: list[tuple[Kernel, str]] = []
    for kernel in TABLE[task]:
        reason = kernel.why_not(situation)
        if not reason:
            return kernel, skipped
        skipped.append((kernel, reason))
    raise AssertionError(f"the last kernel for {task} must always run")


def in_words(situation: Situation) -> str:
    """The kernels of all tasks in a situation, such as "C: attention, elementwise ops; torch: dequantise"."""
    by_language: dict[str, list[str]] = {}
    for task in TABLE:
        kernel, _ = passed_over(task, situation)
        by_language.setdefault(kernel.name.split(":")[0].split(",")[0], []).append(task.replace(",", ""))
    return "; ".join(f"{language}: {', '.join(tasks)}" for language, tasks in by_language.items())



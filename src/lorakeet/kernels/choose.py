"""One table of kernels: for each task the kernels in order of preference. The first one that can run, runs.

The code asks it (`candidates` and the functions below) and calls what the chosen line offers, `lorakeet doctor` prints it
(`passed_over`), and a run's report records what it chose (`in_words`). A new kernel is a file in kernels that offers what
kernels/protocol says, and a line here. Kernels without a source are torch's own operations, which core writes out where they
are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorakeet.kernels import (
    bitsandbytes_nf4,
    blockwise_rows,
    efficient_varlen,
    flash_varlen,
    gptqmodel,
    liger,
    onednn,
)
from lorakeet.kernels.cpu import attention, block, dense, head, int8_rows, operators, panels, stored, trained_pairs
from lorakeet.kernels.cpu import inference_pairs as pairs
from lorakeet.kernels.cpu import trained_block as whole_block
from lorakeet.kernels.cpu.operators import ENABLED
from lorakeet.kernels.device import REHEARSED
from lorakeet.kernels.protocol import (
    DecodeBlocks,
    DenseProducts,
    Dequantiser,
    ElementwiseOps,
    HeadLosses,
    InferencePairs,
    Int8Products,
    Kernel,
    LowRankProducts,
    QuantisedProducts,
    QuantisedWeight,
    Situation,
    TrainedBlocks,
)

_C = "lorakeet.kernels.cpu."
GPTQMODEL = "lorakeet.kernels.gptqmodel"
_LAST = "the last kernel of a task must take everything"
T = TypeVar("T")


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


def _if_parts_in_c(why_not: Callable[[Situation], str], *parts: str) -> Callable[[Situation], str]:
    """Of a C block, which runs the C kernels of `parts` in one call: where another one comes first for a part, the parts run."""

    def reason(situation: Situation) -> str:
        if found := why_not(situation):
            return found
        chosen = {task: passed_over(task, situation)[0] for task in parts}
        others = [f"for {task} it is {kernel.name}" for task, kernel in chosen.items() if not kernel.source.startswith(_C)]
        return others[0] if others else ""

    return reason


TORCH = Kernel("torch", _always)
BATCHED_ROWS = Kernel("torch: batched products", _products_not_narrow)
CPU_FLASH_ROWS = Kernel("torch: CPU flash attention in float32", _not_on_the_cpu)
BLOCKWISE = Kernel("torch: blocks of queries", blockwise_rows.why_not, blockwise_rows.takes, blockwise_rows.NEEDS,
                   "lorakeet.kernels.blockwise_rows:BlockwiseRows")
ROW_BY_ROW = Kernel("torch: row by row", _always)
CAPPING = (BLOCKWISE, ROW_BY_ROW)  # which cap scores, and drop shares
C_ROWS = Kernel("C: attention.c", operators.why_not, attention.takes, attention.NEEDS, _C + "attention:RowAttention")
C_PANELS = Kernel("C: panels.c", operators.why_not, panels.takes, panels.NEEDS, _C + "panels:Panels")

_in_training = _if_parts_in_c(
    dense.why_not, "attention", "elementwise ops", "product, dense weight", "product, quantised weight", "product in int8",
    "low-rank pairs, training",
)  # fmt: skip
_in_generation = _if_parts_in_c(operators.why_not, "elementwise ops", "low-rank pairs, inference", "dense weights, inference")
TABLE: dict[str, tuple[Kernel, ...]] = {
    "decoder block, training": (
        Kernel("C: trained_block.c", _in_training, whole_block.takes, whole_block.NEEDS, _C + "trained_block"),
        Kernel("separate kernels", _always),
    ),
    "decoder block, generation": (
        Kernel("C: block.c", _in_generation, block.takes, block.NEEDS, _C + "block"),
        Kernel("separate kernels", _always),
    ),
    "attention": (
        C_ROWS,
        Kernel("torch: flash varlen", flash_varlen.why_not, flash_varlen.takes, flash_varlen.NEEDS,
               "lorakeet.kernels.flash_varlen:FlashVarlen"),
        Kernel("torch: memory-efficient varlen", efficient_varlen.why_not, efficient_varlen.takes, efficient_varlen.NEEDS,
               "lorakeet.kernels.efficient_varlen:EfficientVarlen"),
        BATCHED_ROWS,
        CPU_FLASH_ROWS,
        BLOCKWISE,
        ROW_BY_ROW,
    ),
    "elementwise ops": (
        Kernel("C: elementwise.c", operators.why_not, operators.takes, operators.NEEDS, _C + "elementwise"),
        Kernel("Liger: norm, gate, rotary positions", liger.why_not, liger.takes, liger.NEEDS, "lorakeet.kernels.liger"),
        TORCH,
    ),
    "product, dense weight": (
        Kernel("C: dense.c", dense.why_not, dense.takes, dense.NEEDS, _C + "dense"),
        TORCH,
    ),
    "product, quantised weight": (
        Kernel("bitsandbytes: gemm_4bit", bitsandbytes_nf4.why_not, bitsandbytes_nf4.takes, bitsandbytes_nf4.NEEDS,
               "lorakeet.kernels.bitsandbytes_nf4", "nf4"),
        Kernel("C: stored.c", stored.why_not, stored.takes, stored.NEEDS, _C + "stored"),
        Kernel("torch, on the dequantised weight", _always),
    ),
    "product in int8": (
        Kernel("C: int8_rows.c", int8_rows.why_not, int8_rows.takes, int8_rows.NEEDS, _C + "int8_rows"),
        TORCH,
    ),
    "dequantise": (
        Kernel("GPTQModel: dequant_kernel", gptqmodel.why_not, gptqmodel.takes_columns, gptqmodel.READABLE, GPTQMODEL, "gptq"),
        Kernel("bitsandbytes: dequantize_4bit", bitsandbytes_nf4.why_not, bitsandbytes_nf4.takes_matrix,
               bitsandbytes_nf4.READABLE, "lorakeet.kernels.bitsandbytes_nf4", "nf4"),
        Kernel("C: stored.c", stored.why_not_dequantise, stored.takes_whole, stored.READABLE, _C + "stored"),
        TORCH,
    ),
    "low-rank pairs, training": (
        Kernel("C: trained_pairs.c", operators.why_not, trained_pairs.takes, trained_pairs.NEEDS, _C + "trained_pairs"),
        TORCH,
    ),
    "low-rank pairs, inference": (
        Kernel("C: pairs.c", operators.why_not, pairs.takes, pairs.NEEDS, _C + "inference_pairs"),
        TORCH,
    ),
    "dense weights, inference": (
        C_PANELS,
        Kernel("oneDNN's layout", onednn.why_not, onednn.takes, onednn.NEEDS, "lorakeet.kernels.onednn:OneDnnOrder"),
        Kernel("torch, in the stored layout", _always),
    ),
    "loss of the head": (
        Kernel("Liger: cross-entropy", liger.why_not, liger.takes_loss, "float32 logits", "lorakeet.kernels.liger"),
        Kernel("C: head.c", head.why_not, head.takes, head.NEEDS, _C + "head"),
        TORCH,
    ),
}  # fmt: skip

CANDIDATES: dict[tuple[object, ...], tuple[Kernel, ...]] = {}  # by task and Situation


def candidates(
    task: str, device: torch.device, dtype: torch.dtype, products: torch.dtype | None = None
) -> tuple[Kernel, ...]:
    """The kernels that can run, in order; the last one takes every call. `products` None: the dtype of the states."""
    return _candidates(task, device.type == "cpu" or device, dtype, products)


def _candidates(
    task: str, place: bool | torch.device, dtype: torch.dtype, products: torch.dtype | None
) -> tuple[Kernel, ...]:
    """`candidates` on the CPU (True) or a device: to make, hash and compare torch's devices takes longer than all else here."""
    key = task, place, dtype, products, ENABLED.get(), REHEARSED.get()
    found = CANDIDATES.get(key)
    if found is None:
        device = torch.device("cpu") if isinstance(place, bool) else place
        situation = Situation(device, dtype, products or dtype, ENABLED.get(), REHEARSED.get())
        found = CANDIDATES[key] = tuple(kernel for kernel in TABLE[task] if not kernel.why_not(situation))
    return found


def first_of(kernels: Iterable[Kernel], *facts: object) -> Kernel:
    """The first kernel that takes a call with these facts."""
    for kernel in kernels:
        if kernel.takes is None or kernel.takes(*facts):
            return kernel
    raise AssertionError(_LAST)


def _chosen(task: str, like: Tensor, products: torch.dtype | None, *facts: object) -> Any:
    """What the first kernel that takes a call with these facts offers, on states like `like`; None: torch's own operations."""
    for kernel in _candidates(task, like.is_cpu or like.device, like.dtype, products):
        if kernel.takes is None or kernel.takes(*facts):
            return kernel.offers
    raise AssertionError(_LAST)


def _first_result(task: str, like: Tensor, call: Callable[[Any], T | None], *facts: object) -> T | None:
    """What `call` gets from the first kernel that takes such a call and can read its weight, else None: then torch must."""
    for kernel in _candidates(task, like.is_cpu or like.device, like.dtype, None):
        if not kernel.source:
            return None
        if (kernel.takes is None or kernel.takes(*facts)) and (found := call(kernel.offers)) is not None:
            return found
    raise AssertionError(_LAST)


def elementwise_ops(*states: Tensor, width: int = operators.LANES, by_rows: bool = False) -> ElementwiseOps | None:
    """The kernel for elementwise ops over states of one dtype; None: torch.

    C needs last dimensions in multiples of `width`. `by_rows`: for norms, which need a whole row at once.
    """
    return _chosen("elementwise ops", states[0], None, states, width, by_rows)  # type: ignore[no-any-return]


def dense_products(x: Tensor, weight: Tensor) -> DenseProducts | None:
    """The kernel for x (tokens, ·) times a frozen weight (out, in) of its dtype; None: torch."""
    return _chosen("product, dense weight", x, None, x, weight)  # type: ignore[no-any-return]


def product_as_stored(weight: QuantisedWeight, x: Tensor, *, across: bool = False) -> Tensor | None:
    """x·Wᵀ, or x·W if `across`, of x (tokens, ·) and a weight as it is stored; None: on the dequantised weight."""

    def call(kernel: QuantisedProducts) -> Tensor | None:
        return kernel.quantised_product(weight, x, across)

    return _first_result("product, quantised weight", x, call, x, weight)


def add_product_as_stored(weight: QuantisedWeight, to: Tensor, x: Tensor, *, across: bool = False) -> bool:
    """Adds that product to `to`, in place; False: the weight must be dequantised for it."""

    def call(kernel: QuantisedProducts) -> bool | None:
        return kernel.add_quantised_product(weight, to, x, across) or None

    return _first_result("product, quantised weight", x, call, x, weight) is not None


def dequantised(weight: QuantisedWeight, out: Tensor, first: int) -> bool:
    """Whether a kernel has written the rows of W from `first` on into `out` (rows, in); False: torch must."""

    def call(kernel: Dequantiser) -> bool | None:
        return kernel.dequantise_into(weight, out, first) or None

    return _first_result("dequantise", out, call, out, weight) is not None


def dequantised_by_columns(weight: QuantisedWeight, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel dequantises all of W by columns, into `out` whose transpose (in, out) is contiguous."""
    kernels = _candidates("dequantise", device.type == "cpu" or device, dtype, None)
    return kernels[0].source == GPTQMODEL and gptqmodel.reads(weight, dtype)


def int8_products(x: Tensor) -> Int8Products | None:
    """The kernel that quantises x (tokens, width) to int8 and multiplies it with int8 weights; None: torch."""
    return _chosen("product in int8", x, None, x)  # type: ignore[no-any-return]


def low_rank_products(
    products: torch.dtype, states: Sequence[Tensor], factors: Sequence[Tensor], places: Sequence[int]
) -> LowRankProducts | None:
    """The kernel for pairs in training, on `states` (x, and the y's), in one call; None: torch, part by part."""
    kernels = candidates("low-rank pairs, training", states[0].device, products)
    return first_of(kernels, states, factors, places).offers  # type: ignore[no-any-return]


def inference_pairs(products: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int]]) -> InferencePairs | None:
    """The kernel that adds copies of pairs to layers with weights of `shapes` (out, in), for inference; None: torch."""
    return first_of(candidates("low-rank pairs, inference", device, products), shapes).offers  # type: ignore[no-any-return]


def trained_block(x: Tensor, products: torch.dtype, head: int, rows: Sequence[int], prefix: int) -> TrainedBlocks | None:
    """The kernel for a whole decoder block in training, on packed rows x (1, tokens, hidden); None: separate kernels."""
    return _chosen("decoder block, training", x, products, x, head, rows, prefix)  # type: ignore[no-any-return]


def decode_block(x: Tensor) -> DecodeBlocks | None:
    """The kernel for a whole decoder block over new tokens x (tokens, hidden) and a cache; None: separate kernels."""
    return _chosen("decoder block, generation", x, None, x)  # type: ignore[no-any-return]


def packed_rows(  # noqa: PLR0917 - the states' dtype and shape, and the rows
    like: Tensor, products: torch.dtype, heads: int, kv: int, d: int, rows: Sequence[int], prefix: int
) -> Kernel:
    """The kernel for causal attention of packed rows, with states like `like`, in `heads` heads of d numbers, `kv` of keys."""
    return first_of(candidates("attention", like.device, like.dtype, products), like, heads, kv, d, rows, prefix)


def capped_rows(like: Tensor, products: torch.dtype) -> Kernel:
    """The kernel for attention whose scores are capped or whose shares are dropped, with states like `like`."""
    return next(kernel for kernel in candidates("attention", like.device, like.dtype, products) if kernel in CAPPING)


def attends_in_c(dtype: torch.dtype, products: torch.dtype, d: int, device: torch.device) -> bool:
    """True if C computes attention with heads of d numbers, for rows that are long enough (kernels/cpu/attention.TILED)."""
    return candidates("attention", device, dtype, products)[0] is C_ROWS and d % operators.HEAD == 0


def inference_layout(weight: Tensor) -> Kernel:
    """The layout of a dense weight (out, in) for products of few tokens; its source takes the weight, unless it is torch's."""
    return first_of(candidates("dense weights, inference", weight.device, weight.dtype), weight)


def loss_kernel(hidden: Tensor, dtype: torch.dtype, vocabulary: int) -> HeadLosses | None:
    """The kernel for losses of hidden states (tokens, hidden) under a head (vocabulary, hidden) of that dtype; None: torch."""
    return _chosen("loss of the head", hidden, dtype, hidden, vocabulary)  # type: ignore[no-any-return]


def passed_over(task: str, situation: Situation) -> tuple[Kernel, list[tuple[Kernel, str]]]:
    """The kernel that a task uses in a situation, and the ones before it in the table, each with the reason."""
    skipped: list[tuple[Kernel, str]] = []
    for kernel in TABLE[task]:
        reason = kernel.why_not(situation)
        if not reason:
            return kernel, skipped
        skipped.append((kernel, reason))
    raise AssertionError(f"the last kernel for {task} must always run")


def in_words(situation: Situation, methods: Collection[str] = ()) -> str:
    """The kernels of all tasks in a situation, such as "C: attention, elementwise ops; torch: dequantise".

    `methods` are those that the model's weights are quantised by: a kernel for another one is left out.
    """
    by_language: dict[str, list[str]] = {}
    for task, kernels in TABLE.items():
        kernel = next(each for each in kernels if each.method in ("", *methods) and not each.why_not(situation))
        by_language.setdefault(kernel.name.split(":")[0].split(",")[0], []).append(task.replace(",", ""))
    return "; ".join(f"{language}: {', '.join(tasks)}" for language, tasks in by_language.items())

"""What a kernel module offers, so that it can stand in the table of kernels/choose.

    why_not(situation)   a sentence that says why the kernel cannot run; empty if it can. Asked once for each Situation.
    takes(...)           True if it supports the tensors and sizes of one call; the arguments are the task's (kernels/choose)
    NEEDS                in words, what `takes` checks

Beside these it has what its task calls, a protocol below. No caller asks which kernel it is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lorakeet.kernels.gptq_words import GptqWords
from lorakeet.kernels.nf4_codes import Nf4Codes


class Situation(NamedTuple):
    """What decides between kernels before there are tensors."""

    device: torch.device
    dtype: torch.dtype  # of the states
    products: torch.dtype  # of the matrix products (core/precision)
    c: bool = True  # whether kernels in C, and liger-kernel's, are enabled in this thread (kernels/cpu/operators.torch_only)
    rehearsed: bool = False  # whether tensors on the CPU stand for those of another device (kernels/device)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A line of the table: a kernel for a task."""

    name: str
    why_not: Callable[[Situation], str]
    takes: Callable[..., bool] | None = None  # None: everything
    needs: str = ""
    source: str = ""  # the module that has it, or module:name; empty for torch's own operations, which core calls
    method: str = ""  # of quantisation, if it reads weights of one alone

    @functools.cached_property
    def offers(self) -> Any:
        """The module or class that the task calls, imported on first use; None for torch's own operations."""
        if not self.source:
            return None
        module, _, name = self.source.partition(":")
        found = importlib.import_module(module)
        return getattr(found, name) if name else found


class QuantisedWeight(Protocol):
    """A frozen weight (out, in) in packed buffers, as kernels may read it (quant/packed)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def packed_buffers(self) -> Iterator[Tensor]:
        """The buffers."""

    def stored(self) -> Any:
        """The weight as C reads it (kernels/cpu/stored.StoredWeight); None if it cannot."""

    def nf4_codes(self, first: int, rows: int) -> Nf4Codes | None:
        """Rows of the weight as NF4 codes in whole blocks; None if they are none."""

    def gptq_words(self) -> GptqWords | None:
        """The weight in GPTQ's words; None if it is in others."""


class QuantisedProducts(Protocol):
    """x·Wᵀ, or x·W if `across`, of x (tokens, ·) and a weight W as it is stored (kernels/cpu/stored)."""

    # (weight, x, across) to the product, in the dtype of x; None for a weight that the kernel cannot read
    quantised_product: Callable[[QuantisedWeight, Tensor, bool], Tensor | None]
    # (weight, to, x, across): adds it to `to` in place; False, with nothing written, for a weight or sum that it does not support
    add_quantised_product: Callable[[QuantisedWeight, Tensor, Tensor, bool], bool]


class Dequantiser(Protocol):
    """Dequantises a weight W (kernels/cpu/stored)."""

    # (weight, out, first): writes the rows of W from `first` on to `out` (rows, in), rounded once; False if it cannot read W
    dequantise_into: Callable[[QuantisedWeight, Tensor, int], bool]


class Int8Products(Protocol):
    """Rows quantised to int8 and their products (kernels/cpu/int8_rows has the shapes)."""

    OUTLIER_COLUMNS: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    QUANTISE_ROWS: Callable[..., tuple[Tensor, Tensor]]
    INT8_PRODUCT: Callable[..., Tensor]


class ElementwiseOps(Protocol):
    """Elementwise ops of a decoder block; formulas and shapes are documented in kernels/cpu/elementwise."""

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_again: Callable[[Tensor, Tensor, Tensor], Tensor]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    gated_backward_: Callable[[Tensor, Tensor, Tensor], Tensor | None]  # None: the gradient holds the result of `gated`
    rotate_: Callable[[Tensor, Tensor, Tensor, bool], None]


class DenseProducts(Protocol):
    """Products with a frozen dense weight (kernels/cpu/dense)."""

    DENSE_PRODUCT: Callable[[Tensor, Tensor, bool], Tensor]
    DENSE_PRODUCT_ADD: Callable[..., None]


class LowRankProducts(Protocol):
    """The low-rank products of all pairs of a batch, in one call each (kernels/cpu/trained_pairs)."""

    TRAINED_PAIRS: Callable[..., Tensor]
    TRAINED_PAIRS_BACKWARD: Callable[..., tuple[Tensor, Tensor]]
    TRAINED_PAIRS_OF_A: Callable[..., Tensor]


class HeadLosses(Protocol):
    """Losses of a head's logits: all columns of a row in fp32, or with TILED in blocks of columns and in the states' dtype."""

    TILED: bool
    loss_in_place: Callable[..., Tensor]  # kernels/liger; without TILED
    blocks: Callable[[Tensor, int], list[tuple[slice, Tensor]]]  # kernels/cpu/head; with TILED
    HEAD_LOSSES: Callable[[Tensor, Tensor, int, bool], Tensor]  # the same


class PackedAttention(Protocol):
    """Causal attention of packed rows: query (1, heads, tokens, d), key and value (1, kv, tokens, d).

    It is made of the rows' lengths, the factor of the scores, and the tokens of a prefix that the rows share.
    """

    @property
    def forward(self) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]:
        """Q, K and V to the result (1, tokens, heads, d), and what `backward` needs beside Q, K and V."""

    @property
    def backward(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """The result's gradient, Q, K, V, and what `forward` saved, to ∂Q, ∂K, ∂V in the shapes of Q, K, V."""


class InferencePairs(Protocol):
    """Pairs of adapters copied into a kernel's own layout, and added to the outputs of layers (kernels/cpu/inference_pairs)."""

    PairLayout: Callable[..., Any]  # of a mix's pairs in its copy
    Shares: Callable[..., Any]  # the tokens that use each copy
    LayerRows: Callable[..., Any]  # adds them to the layers with one input
    as_readable: Callable[[Tensor], Tensor]


class TrainedBlocks(Protocol):
    """A decoder block with pairs, in one call each way (kernels/cpu/trained_block).

    A BlockCall is made of the struct of Weights, the rows' AttentionShape (kernels/cpu/attention) and Pairs.
    """

    Weights: Callable[..., Any]
    Pairs: Callable[..., Any]
    BlockCall: Callable[..., Any]


class DecodeBlocks(Protocol):
    """A decoder block over new tokens and a cache of earlier ones, in one call (kernels/cpu/block)."""

    __name__: str  # of the module
    BlockParts: Callable[..., Any]  # says whether they fit the kernel
    Block: Callable[..., Any]
    BlockPairs: Any  # the pairs of the tokens, from copies in the layout of `Shares`
    Shares: type
    NO_PAIRS: Any

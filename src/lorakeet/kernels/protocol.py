"""What a kernel module offers, so that it can stand in the table of kernels/choose.

    why_not(situation)   a sentence that says why the kernel cannot run; empty if it can. Asked once for each Situation.
    takes(...)           True if it supports the tensors and sizes of one call; the arguments are the task's (kernels/choose)
    NEEDS                in words, what `takes` checks

Beside these it has the functions of its task: ElementwiseOps, DenseProducts, LowRankProducts or PackedAttention below.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Situation(NamedTuple):
    """What decides between kernels before there are tensors."""

    device: torch.device
    dtype: torch.dtype  # of the states
    products: torch.dtype  # of the matrix products (core/precision)
    triton: bool = False  # whether Triton kernels are requested (model.kernels)
    c: bool = True  # whether C kernels are enabled in this thread (kernels/cpu/operators.torch_only)
    rehearsed: bool = False  # whether tensors on the CPU stand for those of another device (kernels/device)


class Kernel(NamedTuple):
    """A line of the table: a kernel for a task."""

    name: str
    why_not: Callable[[Situation], str]
    takes: Callable[..., bool] | None = None  # None: everything
    needs: str = ""
    source: str = ""  # the module that has it, or module:name; empty for torch's own operations, which core calls

    def load(self) -> Any:
        """The module or class of the kernel, imported on first use; None for torch's own operations."""
        return _loaded(self.source) if self.source else None


@functools.cache
def _loaded(source: str) -> Any:
    module, _, name = source.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


class ElementwiseOps(Protocol):
    """Elementwise ops of a decoder block; formulas and shapes are documented in kernels/cpu/elementwise."""

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_again: Callable[[Tensor, Tensor, Tensor], Tensor]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    gated_backward_: Callable[[Tensor, Tensor, Tensor], None]
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

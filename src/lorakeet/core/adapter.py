"""The Adapter: what a run produces. A plain value of named A, B and alpha; it needs no model.

Every format in `formats/` is `read(path) -> Adapter` and `write(adapter, path)`; converting is reading and writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from lorakeet.core.math import Kind, ScaleRule, delta, scale_of


@dataclass(frozen=True)
class Pair:
    """One A and B of an adapter with what is needed to use them (shapes: table in core/math)."""

    A: Tensor
    B: Tensor
    alpha: float
    kind: Kind = "linear"
    scale_rule: ScaleRule = "alpha/rank"
    magnitude: Tensor | None = None  # DoRA's length of each row of W', (out,)
    bias: Tensor | None = None  # PEFT's `lora_bias`: added to B·A·x before the scale, (out,)

    @property
    def rank(self) -> int:
        return self.A.shape[1] if self.kind == "experts" else self.A.shape[0]

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.scale_rule)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in[, k, k]) of the weight that it changes, also if that is stored transposed; for experts (experts, out, in)."""
        if self.kind == "experts":
            return self.A.shape[0], self.B.shape[1], self.A.shape[2]
        return self.B.shape[0], *self.A.shape[1:]

    def delta(self) -> Tensor:
        """scale·B·A in the shape of the frozen weight, fp32; for DoRA the change before the rows are rescaled."""
        return delta(self.A.float(), self.B.float(), self.scale, self.kind)


Places = tuple[int, int, int | None, int | None]  # indices of A, B, magnitude and bias of a pair among the tensors


@dataclass(frozen=True, eq=False)
class FlatPairsLayout:
    """Paths, shapes and scales of the pairs of adapters with one recipe: everything but the numbers.

    It is immutable and compared by identity: what is derived from it holds for all such pairs.
    """

    pairs: Mapping[str, Pair]  # on the meta device
    places: Mapping[str, Places]  # among the tensors
    tensors: tuple[Tensor, ...]  # in fp32 on the meta device, none of them empty

    @cached_property
    def parameters(self) -> int:
        """The number of elements of all pairs."""
        return sum(map(_numbers, self.pairs.values()))


class FlatPairs(Mapping[str, Pair]):
    """The pairs of one adapter by path: views of one flat tensor, in the shapes of a shared layout, created on access."""

    __slots__ = ("outline", "tensors")

    def __init__(self, outline: FlatPairsLayout, numbers: Tensor) -> None:
        """`numbers`: all tensors, flattened and concatenated, fp32; the pairs are views. ValueError for other sizes, dtypes."""
        if numbers.dim() != 1 or numbers.dtype != torch.float32 or len(numbers) != outline.parameters:
            given = f"{tuple(numbers.shape)} in {numbers.dtype}"
            raise ValueError(f"the outline has {outline.parameters} numbers in fp32; given are {given}")
        self.outline = outline
        if numbers.is_meta:
            self.tensors = outline.tensors
        else:
            with torch.no_grad():  # one call: hundreds would pass Python's lock to other threads and back each time
                self.tensors = tuple(_unflatten_dense_tensors(numbers, outline.tensors))  # type: ignore[no-untyped-call]

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """A, B, magnitude and bias of each pair."""
        return map(self._parts, self.outline.places.values())

    def _parts(self, places: Places) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        tensors, (A, B, magnitude, bias) = self.tensors, places
        return (
            tensors[A], tensors[B], None if magnitude is None else tensors[magnitude], None if bias is None else tensors[bias],
        )  # fmt: skip

    def __getitem__(self, path: str) -> Pair:
        known, (A, B, magnitude, bias) = self.outline.pairs[path], self._parts(self.outline.places[path])
        return Pair(A, B, known.alpha, known.kind, known.scale_rule, magnitude, bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline.places)

    def __len__(self) -> int:
        return len(self.outline.places)


_MOST_BEYOND = 1024  # ids past the last row that belong to no row of the adapter: a tokenizer may be longer than its embedding


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding: the rows themselves (not their change), by token id."""

    ids: tuple[int, ...]
    rows: Tensor  # (len(ids), hidden)
    tokens: tuple[str, ...] = ()
    tied: str = ""  # path of the head that shares them

    def problem(self, count: int) -> str:
        """What is wrong with the ids for an embedding of `count` rows, which grows by new tokens; an empty string if nothing."""
        most = count + len(self.ids) + _MOST_BEYOND
        outside = next((one for one in self.ids if not 0 <= one < most), None)
        if outside is not None:
            return f"it has a trained row for the token id {outside:,}, and this base has {count:,} rows. Name its own base."
        return "" if len(set(self.ids)) == len(self.ids) else "it has two trained rows for one token id."


NAMED_BASE = "named_base"  # key of Adapter.metadata
MODEL_TYPE = "model_type"  # another: transformers' type of the base, where PEFT's reader depends on it


@dataclass(frozen=True)
class Adapter:
    """All pairs of an adapter, by the path of the module (of the parameter, for experts) that each belongs to."""

    pairs: Mapping[str, Pair]
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # whole parameters by their path in the model
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)  # by embedding path
    base: str = ""  # name of the base model
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def named_base(self) -> str:
        """The base as the user named it, where that is not a name that transformers loads."""
        return self.metadata.get(NAMED_BASE, self.base)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens whose rows are trained, which are the same in every embedding."""
        return next((rows.ids for rows in self.token_rows.values()), ())

    @property
    def parameters(self) -> int:
        alike = self.pairs.outline if isinstance(self.pairs, FlatPairs) else None
        pairs = sum(map(_numbers, self.pairs.values())) if alike is None else alike.parameters
        return pairs + sum(t.numel() for t in self.extras.values()) + sum(r.rows.numel() for r in self.token_rows.values())


def _numbers(pair: Pair) -> int:
    return sum(tensor.numel() for tensor in (pair.A, pair.B, pair.magnitude, pair.bias) if tensor is not None)

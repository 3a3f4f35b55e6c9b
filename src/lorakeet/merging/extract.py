"""Extracts an adapter from a fully tuned model: for each matrix the best approximation of tuned − base of a given rank.

    linear, conv1d            pair: truncated SVD of tuned − base
    experts                   pair: the same for every expert
    bias of a linear layer    the pair's bias, exactly
    everything else           the tuned parameter, whole (embeddings, head, norms, routers), or reported as left out

Tensors are read in the order of the tuned model's shards, one matrix of each model at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.initialise import seed_for
from lorakeet.core.layers.experts import stored_transposed, why_not_experts
from lorakeet.core.math import Kind
from lorakeet.errors import ConfigError, Problems
from lorakeet.formats.peft.renamed_targets import model_type_of
from lorakeet.merging.checkpoint import Checkpoint
from lorakeet.merging.edits import HEADS, expert_parts, find_shared
from lorakeet.merging.low_rank import LowRank, truncate_matrix
from lorakeet.models import modules

Progress = Callable[[int, int, str], None]  # parameters done, parameters in all, path of the last
Whole = Literal["all", "none"]


@dataclass(frozen=True)
class Extracted:
    """The adapter, how much of each change it captures, and what it leaves out."""

    adapter: Adapter
    captured: dict[str, LowRank] = field(default_factory=dict)  # by path; the factors of experts are those of the last one
    unchanged: int = 0
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """Σ ‖B·A‖² / Σ ‖ΔW‖² over all matrices with a pair; 1 if there are none."""
        whole = sum(low.whole for low in self.captured.values())
        return 1 - sum(low.lost for low in self.captured.values()) / whole if whole > 0 else 1.0


@dataclass(frozen=True)
class _ParameterChange:
    """A parameter of the model and how its change is stored."""

    path: str  # of the parameter
    kind: Kind | Literal["bias", "whole"]


def extract_adapter(
    tuned: Checkpoint,
    base: Checkpoint,
    model: nn.Module,
    *,
    rank: int,
    whole: Whole = "all",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Extracted:
    """The adapter of `rank` that brings `base` nearest to `tuned`. `model`: their architecture on the meta device.

    `whole` "none" leaves out every parameter that a pair cannot represent. ConfigError lists all differences in parameters and
    shapes, or says that the models are equal.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; expected 1 or more.")
    work = _Extraction(tuned, base, rank, whole, seed)
    places = _places(model)
    work.compare_shapes(places)
    in_order = sorted(places, key=lambda place: work.file_of(place.path))
    for number, place in enumerate(in_order, 1):
        work.take(place)
        if on_progress is not None:
            on_progress(number, len(in_order), place.path)
    work.problems.raise_if_any()
    return work.result([place.path for place in places])


def _places(model: nn.Module) -> list[_ParameterChange]:
    """Every parameter of the model, in its order."""
    found = []
    for path, module in modules.original_modules(model):
        kind = modules.kind_of(module)
        pairs = kind in ("linear", "conv1d") and not modules.is_head(model, path, module) and not modules.is_router(model, path)
        stacks = [] if why_not_experts(module) or stored_transposed(module) else modules.expert_stacks(module)
        for leaf, _ in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}" if path else leaf
            if pairs and kind is not None:
                found.append(_ParameterChange(full, kind if leaf == "weight" else "bias"))
            else:
                found.append(_ParameterChange(full, "experts" if leaf in stacks else "whole"))
    return found


class _Extraction:
    def __init__(self, tuned: Checkpoint, base: Checkpoint, rank: int, whole: Whole, seed: int) -> None:
        self.tuned, self.base = tuned, base
        self.rank, self.whole, self.seed = rank, whole, seed
        self.problems = Problems(f"{tuned.folder} is not a tuned copy of {base.folder}")
        self.pairs: dict[str, Pair] = {}
        self.biases: dict[str, Tensor] = {}
        self.extras: dict[str, Tensor] = {}
        self.captured: dict[str, LowRank] = {}
        self.unchanged = 0
        self.left_out: list[str] = []
        self.claimed: set[str] = set()

    def file_of(self, path: str) -> str:
        """The shard of the tuned parameter's first tensor."""
        names = _names(self.tuned, path)
        return self.tuned.home[names[0][0]] if names else ""

    def compare_shapes(self, places: Sequence[_ParameterChange]) -> None:
        """Raises ConfigError listing every parameter that is missing in one model or has another shape."""
        for place in places:
            mine, theirs = _names(self.tuned, place.path), _names(self.base, place.path)
            self.claimed.update(name for names in mine for name in names)
            lacking = [str(side.folder) for side, names in ((self.tuned, mine), (self.base, theirs)) if not names]
            if lacking:
                self.problems.add(f"{place.path} is not in {' and not in '.join(lacking)}.")
                continue
            shapes = [_shapes(self.tuned, mine), _shapes(self.base, theirs)]
            if shapes[0] != shapes[1] and not (self.whole == "none" and place.kind == "whole"):
                advice = " Leave it out with --whole none." if place.kind == "whole" else ""
                self.problems.add(f"{place.path} is {shapes[0][0]} tuned and {shapes[1][0]} in the base.{advice}")
        self.problems.raise_if_any()

    def take(self, place: _ParameterChange) -> None:
        """Compares one parameter and stores its change."""
        names, others = _names(self.tuned, place.path), _names(self.base, place.path)
        if place.kind == "whole":
            self._take_whole(place.path, names, others)
            return
        changes = _changes(self.tuned, self.base, names, others)
        if place.kind != "bias":
            self._take_pair(place, changes)
            return
        (change,) = changes
        if bool(change.any()):
            self.biases[place.path.rpartition(".")[0]] = self._finite(place.path, change)
        else:
            self.unchanged += 1

    def _take_whole(self, path: str, names: list[list[str]], others: list[list[str]]) -> None:
        pairs = [pair for row, other in zip(names, others, strict=False) for pair in zip(row, other, strict=False)]
        same_shapes = _shapes(self.tuned, names) == _shapes(self.base, others)
        if same_shapes and not any(self._differ(name, other) for name, other in pairs):
            self.unchanged += 1
        elif self.whole == "none" or len(pairs) > 1:  # experts that no pair can represent and that are several tensors
            self.left_out.append(path)
        else:
            self.extras[path] = self._finite(path, self.tuned.read(names[0][0]))

    def _take_pair(self, place: _ParameterChange, changes: Iterator[Tensor]) -> None:
        path = place.path if place.kind == "experts" else place.path.rpartition(".")[0]
        found: list[LowRank] = []
        for expert, change in enumerate(changes):
            oriented = change.t() if place.kind == "conv1d" else change
            found.append(truncate_matrix(self._finite(place.path, oriented), self.rank, seed_for(self.seed, f"{path}/{expert}")))
            del change, oriented
        if not any(low.whole for low in found):
            self.unchanged += 1
            return
        A, B = torch.stack([low.A for low in found]), torch.stack([low.B for low in found])
        experts = place.kind == "experts"
        kind: Kind = "experts" if experts else "conv1d" if place.kind == "conv1d" else "linear"
        self.pairs[path] = Pair(A if experts else A[0], B if experts else B[0], float(A.shape[1]), kind)
        lost, whole = sum(low.lost for low in found), sum(low.whole for low in found)
        self.captured[path] = LowRank(found[-1].A, found[-1].B, lost, whole)

    def result(self, order: Sequence[str]) -> Extracted:
        """The adapter in the order of the model, with notes."""
        for path, change in self.biases.items():
            pair = self.pairs.get(path) or _empty_pair(self.base, f"{path}.weight", change.shape[0])
            self.pairs[path] = Pair(pair.A, pair.B, pair.alpha, pair.kind, bias=change / pair.scale)
        owners = {path.rpartition(".")[0] for path in self.extras}
        for path in order:  # a module that is stored whole needs all of its parameters
            if path.rpartition(".")[0] in owners and path not in self.extras:
                self.extras[path] = self.tuned.read(_names(self.tuned, path)[0][0])
        notes = []
        if self.biases and any(pair.kind == "experts" for pair in self.pairs.values()):
            self.left_out += [f"{path}.bias" for path in self.biases]
            self.pairs = {p: Pair(pair.A, pair.B, pair.alpha, pair.kind) for p, pair in self.pairs.items()}
            notes.append("Biases changed too; PEFT's layout cannot hold them beside pairs on experts.")
        strange = sorted(set(self.tuned.home) - self.claimed)
        if strange:
            self.left_out += strange
            notes.append(f"{len(strange)} tensors of {self.tuned.folder} belong to no parameter of the base's model.")
        if not self.pairs and not self.extras:
            raise ConfigError(
                f"{self.tuned.folder} and {self.base.folder} are equal in all {self.unchanged} parameters that were compared"
                + (f"; left out: {', '.join(self.left_out[:8])}." if self.left_out else ".")
                + " There is nothing to extract; name the tuned model first and the one that it was tuned from second."
            )
        places = {path: number for number, path in enumerate(order)}
        rank_of = {path: places.get(f"{path}.weight", places.get(path, 0)) for path in self.pairs}
        pairs = {path: self.pairs[path] for path in sorted(self.pairs, key=rank_of.__getitem__)}
        heads = [path for path in self.extras if path.rpartition(".")[0].rpartition(".")[2] in HEADS]
        if heads and self.base.setting("tie_word_embeddings") is True:
            notes.append(f"The base's embedding and head share one weight, which changed: it is kept twice, also as {heads[0]}.")
        adapter = Adapter(pairs, self.extras, metadata=model_type_of(self.base.config))
        return Extracted(adapter, self.captured, self.unchanged, tuple(self.left_out), tuple(notes))

    def _differ(self, name: str, other: str) -> bool:
        mine, theirs = self.tuned.read(name), self.base.read(other)
        return not torch.equal(mine, theirs) if mine.dtype == theirs.dtype else not torch.equal(mine.float(), theirs.float())

    def _finite(self, path: str, tensor: Tensor) -> Tensor:
        if bool(torch.isfinite(tensor.float()).all()):
            return tensor
        self.problems.add(f"{path} has NaN or infinite values, tuned or in the base.")
        return torch.zeros_like(tensor)


def _names(checkpoint: Checkpoint, path: str) -> list[list[str]]:
    """The tensors of a parameter on disk: a list for each expert if they are stored separately; a head may be the embedding."""
    name = find_shared(checkpoint, path)
    if name is not None:
        return [[name]]
    return expert_parts(checkpoint, path)


def _shapes(checkpoint: Checkpoint, names: list[list[str]]) -> list[tuple[int, ...]]:
    return [checkpoint.stored(name).shape for row in names for name in row]


def _changes(tuned: Checkpoint, base: Checkpoint, names: list[list[str]], others: list[list[str]]) -> Iterator[Tensor]:
    """Yields tuned − base in fp32: of the parameter, or of one expert after another."""
    if len(names) == 1 and len(tuned.stored(names[0][0]).shape) == 3:
        mine, theirs = tuned.read(names[0][0]), base.read(others[0][0])
        yield from (a.float() - b.float() for a, b in zip(mine, theirs, strict=True))
        return
    for row, other in zip(names, others, strict=True):
        yield torch.cat([tuned.read(n).float() - base.read(o).float() for n, o in zip(row, other, strict=True)])


def _empty_pair(base: Checkpoint, name: str, out: int) -> Pair:
    """A pair of rank 1 with ΔW = 0, to carry a bias."""
    shape = base.stored(base.find(name) or name).shape
    width = shape[0] if shape[1] == out else shape[1]
    return Pair(torch.zeros(1, width), torch.zeros(out, 1), 1.0)

"""Combines several adapters into one by their ΔW: checks them, and computes the combined pair or change of each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.core.initialise import seed_for
from lorakeet.core.math import Kind, delta
from lorakeet.errors import Problems, nearest
from lorakeet.merge.low_rank import LowRank, stack_factors, truncate_factors, truncate_matrix
from lorakeet.merge.methods import METHODS, Contribution, Method, combine_changes
from lorakeet.setting import setting

Progress = Callable[[int, int, str], None]  # matrices done, matrices in all, path of the last


@dataclass(frozen=True)
class CombineSpec:
    """How adapters are combined: the method (merge/methods), a weight for each, and the rank of the result.

    `rank` None keeps an exact sum exact, and compresses others to the largest rank of the adapters. `density` is the share of
    entries that pruning keeps; `seed` is for random methods.
    """

    method: str = setting("linear", "Which changes are kept of each adapter, and how they are summed.")
    weights: tuple[float, ...] = setting((), "One for each adapter; 1/n each without them.")
    rank: int | None = setting(None, "Rank of every combined pair.")
    density: float = setting(0.5, "Share of the entries that pruning keeps.")
    seed: int = setting(0, "Decides which entries are dropped where chance does.")

    def validate(self) -> list[str]:
        """Every problem of these settings in words."""
        found = []
        if self.method not in METHODS:
            found.append(f"method is {self.method!r}; expected one of {', '.join(METHODS)}.{nearest(self.method, METHODS)}")
        if self.rank is not None and self.rank < 1:
            found.append(f"rank is {self.rank}; expected 1 or more.")
        if self.method == "cat" and self.rank is not None:
            found.append(f"method cat keeps every factor, so rank {self.rank} has no meaning; use linear or svd to compress.")
        if not 0 < self.density <= 1:
            found.append(f"density is {self.density}; expected more than 0 and at most 1.")
        return found


@dataclass(frozen=True)
class Combined:
    """The combined adapter, and the relative error of each of its matrices."""

    adapter: Adapter
    errors: Mapping[str, float]  # ‖ΔW − B·A‖ / ‖ΔW‖ by path; 0 if nothing was compressed
    error: float  # the same over all matrices together


@dataclass(frozen=True)
class Combination:
    """Adapters that passed the checks, to be combined matrix by matrix."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    method: Method
    spec: CombineSpec
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def paths(self) -> list[str]:
        """Every matrix that some adapter changes, in the order of the adapters."""
        return list(dict.fromkeys(path for adapter in self.adapters for path in adapter.pairs))

    def kind(self, path: str) -> Kind:
        return next(pair.kind for pair, _, _ in self._parts(path))

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of the pair's factors without the rank: (out, *in), or (experts, out, in)."""
        return next(pair for pair, _, _ in self._parts(path)).weight_shape

    def experts(self, path: str) -> int:
        """The number of matrices at `path`: 1 except for experts."""
        return self.shape(path)[0] if self.kind(path) == "experts" else 1

    def change(self, path: str, expert: int = 0) -> Tensor:
        """The combined ΔW of one matrix, fp32 (out, in): convolutions flattened, experts one at a time."""
        parts = [
            Contribution(partial(dense_delta, pair, expert), weight, seed_for(self.spec.seed, f"{number}/{path}/{expert}"))
            for pair, weight, number in self._parts(path)
        ]
        return combine_changes(self.method, parts, density=self.spec.density, total=sum(map(abs, self.weights)))

    def outline(self) -> Adapter:
        """An adapter with the paths, kinds and shapes of the combination, but with the numbers of the first pairs."""
        pairs = {path: next(pair for pair, _, _ in self._parts(path)) for path in self.paths}
        return Adapter(pairs, self.extras, self.token_rows, self.adapters[0].base)

    def pair(self, path: str) -> tuple[Pair, list[LowRank]]:
        """The combined pair, of scale 1, and its low-rank factors, one for each expert."""
        found = [self._low_rank(path, expert) for expert in range(self.experts(path))]
        rank = max(low.A.shape[0] for low in found)
        A = torch.stack([pad(low.A, (0, 0, 0, rank - low.A.shape[0])) for low in found])
        B = torch.stack([pad(low.B, (0, rank - low.B.shape[1])) for low in found])
        kind, shape = self.kind(path), self.shape(path)
        if kind != "experts":
            A, B = A[0], B[0]
        if kind == "conv2d":
            A, B = A.view(rank, *shape[1:]), B.view(shape[0], rank, 1, 1)
        return Pair(A, B, float(rank), kind, bias=self._bias(path)), found

    def combined(self, on_progress: Progress | None = None) -> Combined:
        """Combines matrix by matrix. The pairs have scale 1; the true scales are in B."""
        pairs: dict[str, Pair] = {}
        errors: dict[str, float] = {}
        lost = whole = 0.0
        paths = self.paths
        for number, path in enumerate(paths, 1):
            pairs[path], found = self.pair(path)
            here, size = sum(low.lost for low in found), sum(low.whole for low in found)
            errors[path] = math.sqrt(here / size) if size > 0 else 0.0
            lost, whole = lost + here, whole + size
            if on_progress is not None:
                on_progress(number, len(paths), path)
        first, others = self.adapters[0], self.adapters[1:]
        metadata = {key: value for key, value in first.metadata.items() if all(a.metadata.get(key) == value for a in others)}
        adapter = Adapter(pairs, self.extras, self.token_rows, first.base, metadata)
        return Combined(adapter, errors, math.sqrt(lost / whole) if whole > 0 else 0.0)

    def _low_rank(self, path: str, expert: int) -> LowRank:
        if not self.method.exact:
            return truncate_matrix(self.change(path, expert), self._rank(path), seed_for(self.spec.seed, f"{path}/{expert}"))
        flat = [(pair, weight, *_flat(pair)) for pair, weight, _ in self._parts(path)]
        A, B = stack_factors([(A[expert], B[expert], weight * pair.scale) for pair, weight, A, B in flat])
        if self.spec.rank is None and not self.method.compress:
            widest = min(B.shape[0], A.shape[1])  # a larger rank is redundant
            return LowRank(A, B, 0.0, 1.0) if A.shape[0] <= widest else truncate_factors(A, B, widest)
        return truncate_factors(A, B, min(self._rank(path), A.shape[0]))

    def _rank(self, path: str) -> int:
        """The given rank, or the largest of the adapters; at most min(out, in)."""
        shape = self.shape(path)
        widest = min(shape[1:]) if self.kind(path) == "experts" else min(shape[0], torch.Size(shape[1:]).numel())
        return min(self.spec.rank or max(pair.rank for pair, _, _ in self._parts(path)), widest)

    def _bias(self, path: str) -> Tensor | None:
        """Σ w·s·bias over the pairs with a bias, for a pair of scale 1."""
        found = [pair.bias.float() * (weight * pair.scale) for pair, weight, _ in self._parts(path) if pair.bias is not None]
        return torch.stack(found).sum(0) if found else None

    def _parts(self, path: str) -> Iterator[tuple[Pair, float, int]]:
        for number, (adapter, weight) in enumerate(zip(self.adapters, self.weights, strict=True)):
            if path in adapter.pairs:
                yield adapter.pairs[path], weight, number


def combination(adapters: Mapping[str, Adapter], spec: CombineSpec) -> Combination:
    """Checks the adapters, which are keyed by their names in messages. ConfigError lists everything that prevents combining."""
    names, values = list(adapters), list(adapters.values())
    problems = Problems("These adapters cannot be combined")
    for message in spec.validate():
        problems.add(message)
    if spec.weights and len(spec.weights) != len(values):
        problems.add(f"There are {len(spec.weights)} weights for {len(values)} adapters; give one for each.")
    if not all(math.isfinite(weight) for weight in spec.weights):
        problems.add(f"The weights {', '.join(map(str, spec.weights))} are not all numbers.")
    problems.raise_if_any()
    method = METHODS[spec.method]
    _check_pairs(names, values, method, problems)
    extras = _shared_extras(names, values, problems)
    token_rows = _shared_rows(names, values, problems)
    problems.raise_if_any()
    weights = spec.weights or (1 / len(values),) * len(values)
    notes = tuple(_uneven(adapters))
    return Combination(tuple(values), tuple(map(float, weights)), method, spec, extras, token_rows, notes)


def _check_pairs(names: Sequence[str], adapters: Sequence[Adapter], method: Method, problems: Problems) -> None:
    for name, adapter in zip(names, adapters, strict=True):
        dora = [path for path, pair in adapter.pairs.items() if pair.magnitude is not None]
        if dora:
            problems.add(
                f"{name} is a DoRA adapter ({len(dora)} pairs, first {dora[0]}): its change of a weight depends on the "
                "weight, so it cannot be summed. Merge it alone into its base."
            )
        biased = [path for path, pair in adapter.pairs.items() if pair.bias is not None]
        if biased and not method.exact:
            problems.add(f"{name} has biases in its pairs (first {biased[0]}), which {method.name} cannot combine; use linear.")
    seen: dict[str, tuple[str, Pair]] = {}
    for name, adapter in zip(names, adapters, strict=True):
        for path, pair in adapter.pairs.items():
            other, known = seen.setdefault(path, (name, pair))
            if _alike(known.kind, pair.kind) and known.weight_shape == pair.weight_shape:
                continue
            problems.add(f"{path} is {known.kind} {known.weight_shape} in {other} and {pair.kind} {pair.weight_shape} in {name}.")


def _alike(one: Kind, other: Kind) -> bool:
    """True for equal kinds, and for linear and GPT-2's conv1d: they have the same factors, and files confuse them."""
    return one == other or {one, other} == {"linear", "conv1d"}


def _shared_extras(names: Sequence[str], adapters: Sequence[Adapter], problems: Problems) -> dict[str, Tensor]:
    """The whole parameters, which must be equal in all adapters; a frozen weight that PEFT saves under a pair may be missing."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.extras):
        holders = [name for name, adapter in zip(names, adapters, strict=True) if path in adapter.extras]
        tensors = [adapter.extras[path] for adapter in adapters if path in adapter.extras]
        lacking = [name for name in names if name not in holders]
        under_a_pair = any(path.rpartition(".")[0] in adapter.pairs for adapter in adapters)
        if lacking and not under_a_pair:
            problems.add(f"{', '.join(holders)} trained {path} whole, {', '.join(lacking)} did not; whole weights have no sum.")
        elif any(other.shape != tensors[0].shape or not torch.equal(other, tensors[0]) for other in tensors[1:]):
            problems.add(f"{path} was trained whole and differs between {', '.join(holders)}; whole weights have no sum.")
        found[path] = tensors[0]
    return found


def _shared_rows(names: Sequence[str], adapters: Sequence[Adapter], problems: Problems) -> dict[str, TokenRows]:
    """The trained token rows, which must be equal in all adapters."""
    found: dict[str, TokenRows] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.token_rows):
        rows = [adapter.token_rows.get(path) for adapter in adapters]
        first = next(row for row in rows if row is not None)
        if any(row is None or row.ids != first.ids or not torch.equal(row.rows, first.rows) for row in rows):
            problems.add(f"The trained token rows of {path} differ between {', '.join(names)}; rows of new tokens have no sum.")
        found[path] = first
    return found


def _uneven(adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """Yields a sentence for each adapter that does not change all of the matrices."""
    everything = {path for adapter in adapters.values() for path in adapter.pairs}
    for name, adapter in adapters.items():
        if len(adapter.pairs) < len(everything):
            yield f"{name} changes {len(adapter.pairs)} of the {len(everything)} matrices; for the others it counts as no change."


def dense_delta(pair: Pair, expert: int = 0) -> Tensor:
    """ΔW of one matrix of a pair, fp32 (out, in): convolutions flattened."""
    A, B = _flat(pair)
    return delta(A[expert], B[expert], pair.scale)


def _flat(pair: Pair) -> tuple[Tensor, Tensor]:
    """A (matrices, rank, in) and B (matrices, out, rank) in fp32."""
    if pair.kind == "experts":
        return pair.A.float(), pair.B.float()
    return pair.A.float().flatten(1)[None], pair.B.float().flatten(1)[None]

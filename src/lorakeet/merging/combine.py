"""Combines several adapters into one by their ΔW: checks them, and computes the combined pair or change of each matrix.

Every method works on ΔW_i = s_i·B_i·A_i, never on A and B: the product of their sums has cross terms that no adapter has.

                 kept of each ΔW_i                                   sum
    linear       all                                                 Σ w_i·ΔW_i
    cat          all; stays a concatenation of the factors           Σ w_i·ΔW_i
    svd          all; re-compressed                                  Σ w_i·ΔW_i
    magnitude    the largest `density` of its entries                Σ w_i·ΔW_i
    ties         the largest `density` (https://arxiv.org/abs/2306.01708)            mean of those with the elected sign
    dare         a random `density`, divided by it (https://arxiv.org/abs/2311.03099)                        Σ w_i·ΔW_i
    della        random, larger entries likelier (https://arxiv.org/abs/2406.11617)  mean of those with the elected sign

The elected sign of an entry is that of Σ w_i·ΔW_i over what was kept. The mean is weighted by |w_i| over the adapters that agree,
and multiplied by Σ |w_i|: if all agree it is the weighted sum; with weights that sum to 1 it is the papers' mean. If nothing is
dropped and all signs agree, every method equals `linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorakeet.core.adapter import MODEL_TYPE, Adapter, Pair, TokenRows
from lorakeet.core.initialise import seed_for
from lorakeet.core.math import Kind, delta
from lorakeet.errors import Problems, nearest
from lorakeet.merging.low_rank import LowRank, stack_factors, truncate_factors, truncate_matrix
from lorakeet.setting import setting

DELLA_WINDOW = 0.2  # difference of the drop probabilities of a row's smallest and largest entry (ε of the paper)
Progress = Callable[[int, int, str], None]  # matrices done, matrices in all, path of the last
Prune = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class CombineSpec:
    """How adapters are combined: the method (METHODS), a weight for each, and the rank of the result.

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
        return Adapter(pairs, self.extras, self.token_rows, self.adapters[0].base, _shared_metadata(self.adapters))

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
        biases = [pair.bias.float() * (weight * pair.scale) for pair, weight, _ in self._parts(path) if pair.bias is not None]
        return Pair(A, B, float(rank), kind, bias=torch.stack(biases).sum(0) if biases else None), found

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
        adapter = Adapter(pairs, self.extras, self.token_rows, self.adapters[0].base, _shared_metadata(self.adapters))
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
    count = len({path for adapter in values for path in adapter.pairs})
    notes = tuple(
        f"{name} changes {len(adapter.pairs)} of the {count} matrices; for the others it counts as no change."
        for name, adapter in adapters.items()
        if len(adapter.pairs) < count
    )
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
            kinds = {known.kind, pair.kind}  # GPT-2's conv1d has the same factors as linear, and files confuse them
            if (len(kinds) == 1 or kinds == {"linear", "conv1d"}) and known.weight_shape == pair.weight_shape:
                continue
            problems.add(f"{path} is {known.kind} {known.weight_shape} in {other} and {pair.kind} {pair.weight_shape} in {name}.")


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


def _shared_metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    """What all adapters say alike; the type of the base also if only some say it, and none another."""
    shared = dict(set.intersection(*(set(adapter.metadata.items()) for adapter in adapters)))
    types = {adapter.metadata[MODEL_TYPE] for adapter in adapters if MODEL_TYPE in adapter.metadata}
    return dict(sorted(shared.items())) | ({MODEL_TYPE: types.pop()} if len(types) == 1 else {})


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


def dense_delta(pair: Pair, expert: int = 0) -> Tensor:
    """ΔW of one matrix of a pair, fp32 (out, in): convolutions flattened."""
    A, B = _flat(pair)
    return delta(A[expert], B[expert], pair.scale)


def _flat(pair: Pair) -> tuple[Tensor, Tensor]:
    """A (matrices, rank, in) and B (matrices, out, rank) in fp32."""
    if pair.kind == "experts":
        return pair.A.float(), pair.B.float()
    return pair.A.float().flatten(1)[None], pair.B.float().flatten(1)[None]


@dataclass(frozen=True)
class Method:
    """A method. `prune` None keeps everything, so that the sum is exact in low-rank factors."""

    name: str
    prune: Prune | None = None
    elect: bool = False  # entries vote on their sign
    compress: bool = False  # a rank is chosen if none is given

    @property
    def exact(self) -> bool:
        """True if the result is Σ w_i·ΔW_i exactly, apart from compression."""
        return self.prune is None and not self.elect


def keep_largest(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The round(density·n) entries of largest magnitude, the others 0; at least one."""
    del generator
    count = max(1, round(density * change.numel()))
    if count >= change.numel():
        return change
    kept = change.abs().flatten().topk(count, sorted=False).indices
    result = torch.zeros_like(change).flatten()
    result[kept] = change.flatten()[kept]
    return result.view_as(change)


def drop_random(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps each entry with probability `density` and divides it by that, so that the expectation is `change`."""
    return torch.where(torch.rand(change.shape, generator=generator) < density, change / density, 0.0)


def drop_by_magnitude(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """MagPrune of DELLA: in each row, an entry of rank r (0 the smallest) of n is kept with probability

        density − ε/2 + ε·r/(n − 1)

    and divided by it. ε is `DELLA_WINDOW`, or smaller to keep every probability above 0 and at most 1.
    """
    window = min(DELLA_WINDOW, density, 2 * (1 - density))
    ranks = change.abs().argsort(dim=1).argsort(dim=1).float()
    kept = density - window / 2 + window * ranks / max(change.shape[1] - 1, 1)
    return torch.where(torch.rand(change.shape, generator=generator) < kept, change / kept, 0.0)


@dataclass(frozen=True)
class Contribution:
    """An adapter's part in a matrix: a function that makes its ΔW, its weight, and a seed."""

    change: Callable[[], Tensor]  # a new fp32 (out, in)
    weight: float
    seed: int

    def pruned(self, method: Method, density: float) -> Tensor:
        """What the method keeps of ΔW, as a tensor that may be modified."""
        change = self.change()
        if method.prune is None:
            return change
        return method.prune(change, density, torch.Generator().manual_seed(self.seed))


METHODS = {
    method.name: method
    for method in (
        Method("linear"),
        Method("cat"),
        Method("svd", compress=True),
        Method("magnitude", keep_largest, compress=True),
        Method("ties", keep_largest, elect=True, compress=True),
        Method("dare", drop_random, compress=True),
        Method("della", drop_by_magnitude, elect=True, compress=True),
    )
}


def combine_changes(method: Method, parts: Sequence[Contribution], *, density: float, total: float | None = None) -> Tensor:
    """Combines the ΔW (out, in) of the adapters that change this matrix.

    `total` is Σ |w_i| over all adapters, also those that do not change this matrix; by default over `parts`. At most three
    matrices are in memory without sign election, and with it three and one for each adapter.
    """
    pruned = (part.pruned(method, density).mul_(part.weight) for part in parts)
    if not method.elect:
        result = next(pruned)
        for change in pruned:
            result.add_(change)
        return result
    changes = list(pruned)
    sign = torch.zeros_like(changes[0])
    for change in changes:
        sign.add_(change)
    sign.sign_()
    votes, result = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, part in zip(changes, parts, strict=True):
        agrees = change * sign > 0
        result.add_(change.mul_(agrees))
        votes.add_(agrees, alpha=abs(part.weight))
    factor = sum(abs(part.weight) for part in parts) if total is None else total
    return result.mul_(factor).div_(votes.masked_fill_(votes == 0, 1.0))

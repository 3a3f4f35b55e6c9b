"""Cuts pairs to a lower rank with the least change of the loss: the SVD of ΔW weighted by input and gradient moments.

With C = E[x·xᵀ] of a matrix's inputs and S = E[g·gᵀ] of the loss's gradients at its outputs, an error E of ΔW changes the loss,
to second order and in K-FAC's approximation (Martens and Grosse 2015, arXiv 1503.05671), by ½·‖S^½·E·C^½‖²_F. The
best cut in that norm is a truncated SVD of S^½·ΔW·C^½. Since ΔW = s·B·A is thin, neither S nor C is ever formed:

    M = E[(A·x)(A·x)ᵀ] = L·Lᵀ      N = E[(Bᵀ·g)(Bᵀ·g)ᵀ] = Rᵀ·R      R·L = U·Σ·Vᵀ, all (rank, rank)

    B' = B·R⁻¹·U_k·Σ_k^½      A' = Σ_k^½·V_kᵀ·L⁻¹·A      ΔW' = s·B'·A'

With S the identity this is the activation-weighted SVD, with both the plain one of Eckart and Young.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import alpha_for
from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.models import modules
from lorakeet.ranks.allocate import allocate, pair_parameters
from lorakeet.ranks.spec import parameter_count

DAMPING = 0.01  # share of the mean of C and S added to every direction, since few rows leave some unseen
Weighting = Literal["loss", "activation", "none"]


@dataclass
class Moments:
    """The moments of one pair, summed over tokens: M and N of the module's docstring, and the traces of C and S, in fp64."""

    inputs: Tensor  # Σ (A·x)(A·x)ᵀ, (rank, rank)
    gradients: Tensor  # Σ (Bᵀ·g)(Bᵀ·g)ᵀ, (rank, rank)
    input_trace: float = 0.0
    gradient_trace: float = 0.0


@dataclass(frozen=True)
class Spectrum:
    """A pair rotated so that its components are ordered by importance: any rank is a prefix of it."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)
    values: Tensor  # s·Σ, descending; a cut to rank k loses Σ_{j>k} values²


def check_pairs(adapter: Adapter) -> None:
    """Raises ConfigError that names every pair that cannot be cut."""
    problems = Problems("This adapter cannot be compressed")
    if not adapter.pairs:
        problems.add("It has no low-rank pairs.")
    for path, pair in adapter.pairs.items():
        if pair.magnitude is not None:
            problems.add(f"'{path}' is a DoRA pair: its magnitudes were trained with its ΔW.")
        elif pair.kind not in ("linear", "conv1d"):
            problems.add(f"'{path}' is on a {pair.kind} weight; only pairs on linear layers can be cut.")
    problems.raise_if_any()


@contextmanager
def collect_moments(model: nn.Module, name: str) -> Iterator[dict[str, Moments]]:
    """A context in which forward and backward passes with the active adapter `name` fill the Moments of its pairs, by path.

    The pairs must be called as modules, so fused MLPs must be unfused (models/fuse.unfuse).
    """
    found: dict[str, Moments] = {}
    with ExitStack() as hooks:
        for path, layer in modules.adapted_layers(model):
            pair = dict(layer.adapters.items()).get(name)
            if isinstance(pair, LoraPair):
                zeros = torch.zeros(pair.A.shape[0], pair.A.shape[0], dtype=torch.float64)
                found[path] = Moments(zeros, zeros.clone())
                hooks.callback(pair.register_forward_hook(_watch(found[path])).remove)
        yield found


def _watch(moments: Moments) -> Callable[..., None]:
    def hook(pair: LoraPair, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, B = pair.A.detach(), pair.B.detach()
        x = inputs[0].detach().flatten(0, -2).float()
        moments.inputs += _gram(x @ A.t())
        moments.input_trace += float(x.double().square().sum())

        def seen(grad: Tensor) -> None:
            g = grad.detach().flatten(0, -2).float()
            moments.gradients += _gram(g @ B)
            moments.gradient_trace += float(g.double().square().sum())

        output.register_hook(seen)  # type: ignore[no-untyped-call]

    return hook


def _gram(states: Tensor) -> Tensor:
    wide = states.double().cpu()
    return wide.t() @ wide


def spectrum(pair: Pair, moments: Moments, weighting: Weighting = "loss") -> Spectrum:
    """The components of `pair` in the order of Σ (see above), on the CPU. Raises DataError for non-finite moments."""
    A, B = pair.A.double(), pair.B.double()
    M, N = A @ A.t(), B.t() @ B
    if weighting != "none":
        M = moments.inputs + DAMPING * moments.input_trace / A.shape[1] * M
    if weighting == "loss":
        N = moments.gradients + DAMPING * moments.gradient_trace / B.shape[0] * N
    if not (M.isfinite().all() and N.isfinite().all()):
        what = "The input of a pair, or the loss's gradient at it, is not finite on these rows"
        raise DataError(f"{what}. Check the adapter with lorakeet evaluate, or try --weighting none.")
    L, L_inverse = _root(M)
    R, R_inverse = (factor.t() for factor in _root(N))
    U, S, Vh = torch.linalg.svd(R @ L, full_matrices=False)
    new_a, new_b = S.sqrt()[:, None] * (Vh @ (L_inverse @ A)), (B @ (R_inverse @ U)) * S.sqrt()
    lengths = (new_b.norm(dim=0) / new_a.norm(dim=1).clamp(min=1e-300)).sqrt()  # balances the norms of the factors
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    return Spectrum((new_a * lengths[:, None]).float(), (new_b / lengths).float(), S * abs(pair.scale))


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """L with `moment` = L·Lᵀ, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((moment + moment.t()) / 2)
    values = values.clamp(min=0)
    root = values.sqrt()
    inverse = torch.where(values > values[-1] * 1e-14, 1 / root.clamp(min=1e-300), torch.zeros_like(root))
    return vectors * root, inverse[:, None] * vectors.t()


def spectra(adapter: Adapter, moments: Mapping[str, Moments], weighting: Weighting = "loss") -> dict[str, Spectrum]:
    """The Spectrum of every pair. Raises ConfigError for pairs that cannot be cut, DataError for non-finite moments."""
    check_pairs(adapter)
    return {path: spectrum(pair, moments[path], weighting) for path, pair in adapter.pairs.items()}


def cut_to_budget(adapter: Adapter, plan: Plan, found: Mapping[str, Spectrum], budget: int) -> Adapter:
    """`adapter` cut to at most `budget` parameters in all pairs, with the ranks of the largest Σ² per parameter.

    `plan` describes the adapter in its base. Raises ConfigError for a budget below rank 1 each or above the present size.
    """
    gains = {path: each.values.square().tolist() for path, each in found.items()}
    chosen = allocate(plan, gains, budget)
    return cut_to_ranks(adapter, found, {entry.path: entry.rank for entry in chosen.entries})


def cut_to_ranks(adapter: Adapter, found: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> Adapter:
    """`adapter` with its pairs cut to `ranks` (or their own, if lower) at the same scale; extras unchanged."""
    pairs = {}
    for path, pair in adapter.pairs.items():
        rank = min(ranks[path], pair.rank)
        A, B = found[path].A[:rank].contiguous(), found[path].B[:, :rank].contiguous()
        pairs[path] = replace(pair, A=A, B=B, alpha=alpha_for(pair.scale, rank, pair.scale_rule))
    return replace(adapter, pairs=pairs)


def cut_to_target(text: str, adapter: Adapter, plan: Plan, found: Mapping[str, Spectrum]) -> Adapter:
    """The adapter cut to "0.5M" (parameters of its pairs) or "rank 8". Raises ConfigError for other text."""
    word = text.strip().lower()
    if not word.startswith("r"):
        return cut_to_budget(adapter, plan, found, parameter_count(text, "--to"))
    number = word.removeprefix("rank").removeprefix("r").strip()
    highest = max(pair.rank for pair in adapter.pairs.values())
    if not number.isdigit() or not 1 <= int(number) < highest:
        raise ConfigError(f"--to is {text!r}; expected parameters such as 0.5M, or 'rank N' with N from 1 to {highest - 1}.")
    return cut_to_ranks(adapter, found, dict.fromkeys(adapter.pairs, int(number)))
SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)  # of the pairs' parameters: the points of the curve


@dataclass(frozen=True)
class RankedCut:
    """An adapter cut to a size, and what that is called."""

    name: str
    adapter: Adapter
    parameters: int


def sizes_of(adapter: Adapter, plan: Plan, found: Mapping[str, Spectrum], to: str | None) -> list[RankedCut]:
    """The requested size, then the other sizes of the curve, the largest first."""
    full = pair_parameters(plan)
    least = pair_parameters(replace(plan, entries=tuple(replace(entry, rank=1) for entry in plan.entries)))
    cuts = [] if to is None else [_size(cut_to_target(to, adapter, plan, found))]
    if to is not None and cuts[0].parameters >= full:
        raise ConfigError(f"--to {to} is not less than the {full:,} parameters of the pairs. Give a smaller size.")
    for share in SHARES:
        if least <= round(share * full) < full:
            item = _size(cut_to_budget(adapter, plan, found, round(share * full)))
            if item.parameters not in {other.parameters for other in cuts}:
                cuts.append(item)
    if not cuts:
        raise ConfigError(f"The pairs have {full:,} parameters and rank 1 each: there is nothing to cut. Keep the adapter.")
    return cuts


def _size(adapter: Adapter) -> RankedCut:
    parameters = sum(pair.A.numel() + pair.B.numel() for pair in adapter.pairs.values())
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
    return RankedCut(f"{parameters:,} parameters, {span}", adapter, parameters)

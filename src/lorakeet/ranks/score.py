"""Estimates the gain of each rank of each matrix from a few batches, without full-size weight gradients.

The gradient of a pair is a product with the gradient G = ∂L/∂W of its frozen weight: at B = 0 it is ∂L/∂B = G·Aᵀ, and at A = 0 it
is ∂L/∂A = Bᵀ·G. Training's own backward pass over a pair with random A therefore gives the sketch of a randomised SVD (Halko et
al. 2011), and a second pass with B = orth(G·Aᵀ) gives the small matrix Bᵀ·G that holds the leading singular triples. Any base
that can be trained on can be scored: packed, experts, convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lorakeet.core.initialise import seed_for
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.errors import ConfigError, DataError
from lorakeet.models import modules

LENGTH = 3**-0.5  # norm of a row of A, as in the random start, so that learning rates are comparable
OVERSAMPLING = 8  # directions beyond the highest rank, for accuracy


def sketch_plan(plan: Plan, largest: int) -> Plan:
    """The plan of the pairs for reading gradients: plain LoRA of rank `largest` plus oversampling, of scale 1."""
    return replace(plan, entries=tuple(_sketch_entry(entry, largest) for entry in plan.entries), extras=())


def _sketch_entry(entry: PlanEntry, largest: int) -> PlanEntry:
    rank = min(largest + OVERSAMPLING, entry.largest_rank)
    return replace(entry, rank=rank, alpha=float(rank), scale_rule="alpha/rank", variant="lora", start="kaiming", dropout=0.0)


Halves = tuple[dict[str, Tensor], dict[str, Tensor]]  # by path, Bᵀ·G (…, rank, in) of each half of the rows


def gradient_halves(plan: Plan, parameters: Mapping[str, nn.Parameter], backward: Callable[[int], None], *, seed: int) -> Halves:
    """Bᵀ·G of each half of the rows, where B is an orthonormal basis of the sketched range of the first half's G.

    `plan` is the `sketch_plan`, `parameters` its pairs in the model (PATH.A, PATH.B), and `backward(half)` adds the gradients of
    the mean loss over half 0 or 1 of the rows.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "ranks"))
    with torch.no_grad():
        for entry in plan.entries:
            A, B = parameters[f"{entry.path}.A"], parameters[f"{entry.path}.B"]
            A.copy_(torch.randn(A.shape, generator=generator))
            B.zero_()
    _clear(parameters)
    backward(0)
    with torch.no_grad():
        for entry in plan.entries:
            A, B = parameters[f"{entry.path}.A"], parameters[f"{entry.path}.B"]
            sketch = _by_expert(_grad(B), entry)  # G·Aᵀ
            B.copy_(torch.linalg.qr(torch.nan_to_num(sketch)).Q.view(B.shape))  # NaN shows again in the second pass
            A.zero_()
    halves = []
    for half in (0, 1):
        _clear(parameters)
        backward(half)
        halves.append({entry.path: _by_expert(_grad(parameters[f"{entry.path}.A"]), entry).cpu() for entry in plan.entries})
    _clear(parameters)
    return halves[0], halves[1]


def gradient_gains(halves: Halves, *, largest: int) -> dict[str, list[float]]:
    """By path, the gradient energy of the k-th rank, k = 1 … `largest`, cross-validated on the other half of the rows.

    Directions u_k, v_k and σ_k come from half 0; the gain is σ_k·u_kᵀ·G₁·v_k with G₁ of half 1: σ_k² if both halves agree, 0 on
    average if a direction is noise of a few rows. (LoRA-GA, arXiv 2407.05000, and GoRA take σ_k² itself, which grows with noise.)
    """
    return {path: _shared_energy(halves[0][path], halves[1][path], largest) for path in halves[0]}


def gradient_directions(halves: Halves, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """By path, A (rank, in) along the leading right singular vectors of the gradient of all rows, with a random A's row norms.

    At B = 0 the first step's ∂L/∂B = s·G·Aᵀ then captures the most of G for this rank. LoRA-GA starts in the same directions, but
    with B ≠ 0 and the product subtracted from the base; here the base and the adapter's size stay unchanged.
    """
    found = {}
    for path, rank in ranks.items():
        both = (halves[0][path] + halves[1][path]).double()
        _require_finite(path, both)
        found[path] = (LENGTH * torch.linalg.svd(both, full_matrices=False).Vh[:rank]).float()
    return found


def _require_finite(path: str, numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise DataError(
            f"The states at '{path}' are not finite on these rows, so lora.start has no direction there. Try model.dtype "
            "float32, or lora.start kaiming."
        )


def _grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _clear(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def _by_expert(factor: Tensor, entry: PlanEntry) -> Tensor:
    """A as (…, rank, in) or B as (…, out, rank), batched over experts."""
    return factor if entry.kind == "experts" else factor.flatten(1)


def _shared_energy(found: Tensor, other: Tensor, largest: int) -> list[float]:
    """σ_k·u_kᵀ·`other`·v_k of the singular triples of `found` (…, rank, in), non-increasing; summed over experts."""
    if not (found.isfinite().all() and other.isfinite().all()):
        return [float("nan")] * min(largest, found.shape[-2])
    found, other = found.double(), other.double()  # one matrix at a time, to save memory
    U, S, Vh = torch.linalg.svd(found, full_matrices=False)
    seen = torch.einsum("...ik,...ij,...kj->...k", U, other, Vh)
    energy = S * seen
    total = energy.flatten(0, -2).sum(0) if energy.dim() > 1 else energy
    return non_increasing(total.tolist()[:largest])


def non_increasing(values: list[float]) -> list[float]:
    """The nearest non-increasing sequence (least squares), since a rank follows the ones before it."""
    blocks: list[tuple[float, int]] = []  # (mean, length); pool adjacent violators
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, length in blocks for _ in range(length)]


def variance_gains(sketches: Mapping[str, Sketch], plan: Plan, *, largest: int) -> dict[str, list[float]]:
    """By path, the share of the sketched second moment along its k-th direction, k = 1 … `largest`."""
    return {entry.path: sketches[entry.path].shares(min(largest, entry.largest_rank)) for entry in plan.entries}


def activation_directions(sketches: Mapping[str, Sketch], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """By path, A (rank, in) along the leading directions of the inputs, as in EVA, with a random A's row norms."""
    return {path: LENGTH * sketches[path].directions(path, rank) for path, rank in ranks.items()}


def sketch_states(
    model: nn.Module, plan: Plan, forward: Callable[[], None], *, of: Literal["input", "output"], largest: int, seed: int
) -> dict[str, Sketch]:
    """By path, a sketch of the second moment of the matrix's inputs x, or outputs W·x; `forward()` runs the bare model.

    input: EVA (arXiv 2410.07170), which gives rank to the directions that explain most of the activations. output: weight ×
    activation, the singular values of W·C^½ with C = E[x·xᵀ] (CorDA, arXiv 2406.05223, takes those of W·C). The moments are never
    formed: C·Ω for a random Ω gives the leading eigenvalues (Nyström), ‖x‖² the whole.
    """
    refused = [entry.path for entry in plan.entries if entry.kind not in ("linear", "conv1d")]
    if refused:
        raise ConfigError(
            f"ranks.score {'activation' if of == 'input' else 'sensitivity'} reads linear layers only, not '{refused[0]}'. Use "
            "ranks.score gradient, or exclude it."
        )
    generator = torch.Generator().manual_seed(seed_for(seed, "ranks"))
    sketches: dict[str, Sketch] = {}
    with ExitStack() as hooks, torch.no_grad():
        for entry in plan.entries:
            width = entry.shape[1] if of == "input" else entry.shape[0]
            sketch = sketches[entry.path] = Sketch(width, min(largest + OVERSAMPLING, width), generator)
            module = cast(nn.Module, modules.find(model, entry.path))  # or the layer that wraps it for other adapters
            hooks.callback(module.register_forward_hook(_watch(sketch, of, modules.unwrapped(module))).remove)
        forward()
    return sketches


def _watch(sketch: Sketch, of: str, frozen: nn.Module) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        bias = getattr(frozen, "bias", None)  # constant over tokens: no direction for a pair
        sketch.add(inputs[0] if of == "input" else output if bias is None else output - bias)

    return hook


class Sketch:
    """C·Ω and the trace of a second moment C = Σ x·xᵀ that is never formed."""

    def __init__(self, width: int, size: int, generator: torch.Generator) -> None:
        self.omega: Tensor = torch.linalg.qr(torch.randn(width, size, generator=generator)).Q  # (width, size)
        self.product = torch.zeros(width, size)
        self.trace, self.states = 0.0, 0  # states: how many were added

    def add(self, states: Tensor) -> None:
        """Adds states (…, width)."""
        x = states.detach().flatten(0, -2).float().cpu()
        self.product += x.t() @ (x @ self.omega)
        self.trace += float(x.double().square().sum())
        self.states += len(x)

    def shares(self, count: int) -> list[float]:
        """The leading eigenvalues over the trace, descending; NaN for non-finite states or a zero trace."""
        if not self.product.isfinite().all() or self.trace == 0:
            return [float("nan")] * count
        found = torch.linalg.svdvals(self._root()).square() / self.trace
        padded = torch.cat([found, torch.zeros(max(0, count - len(found)), dtype=found.dtype)])
        return [float(value) for value in padded[:count]]

    def directions(self, path: str, count: int) -> Tensor:
        """The leading eigenvectors as rows (count, width), random ones beyond the span of the states.

        Raises DataError for non-finite states, or none."""
        if not self.states:
            said = f"No token of the rows reaches '{path}', so lora.start has no direction there."
            raise DataError(f"{said} Raise ranks.rows, leave it out with lora.exclude_modules, or use lora.start kaiming.")
        _require_finite(path, self.product)
        found = self.omega.t()[:count].clone()
        if self.trace > 0:
            vectors = torch.linalg.svd(self._root(), full_matrices=False).U.t()[:count]
            found[: len(vectors)] = vectors.float()
        return found

    def _root(self) -> Tensor:
        """R (width, directions) with R·Rᵀ = (C·Ω)·(Ωᵀ·C·Ω)⁻¹·(C·Ω)ᵀ."""
        Y, core = self.product.double(), self.omega.double().t() @ self.product.double()
        values, vectors = torch.linalg.eigh((core + core.t()) / 2)
        kept = values > values[-1].clamp(min=0) * 1e-10
        root: Tensor = (Y @ vectors[:, kept]) / values[kept].sqrt()
        return root

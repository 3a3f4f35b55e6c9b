"""What the tests of models share: a model with a random adapter in place, and rows laid end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.data.pack import Batch
from lorakeet.models.families import family_of
from lorakeet.models.inject import inject, trained_parameters
from lorakeet.models.targets import plan_for


@pytest.fixture
def planned() -> Callable[..., Plan]:
    """`planned(model, rank=…, …)`: the plan of a LoraSpec with rank 4 and alpha 12 unless told otherwise."""

    def build(model: Any, **settings: Any) -> Plan:
        return plan_for(model, LoraSpec(**{"rank": 4, "alpha": 12.0, **settings}), family_of(getattr(model, "config", "")))

    return build


@pytest.fixture
def adapted(planned: Callable[..., Plan]) -> Callable[..., Any]:
    """`adapted(model, name="default", seed=0, **settings)`: the model with an adapter whose numbers are all random."""

    def build(model: Any, name: str = "default", *, seed: int = 0, **settings: Any) -> Any:
        inject(model, planned(model, **settings), name, seed=seed)
        shake(model, name, seed=seed)
        return model

    return build


def shake(model: Any, name: str = "default", *, seed: int = 0) -> None:
    """Moves every trained number of an adapter away from its start."""
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in trained_parameters(model, name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def rows() -> Callable[..., Batch]:
    """`rows([5, 9, 2])`: a batch of random rows of these lengths, every token but a row's first a target."""

    def build(lengths: Sequence[int], *, vocab: int = 90, seed: int = 0) -> Batch:
        ids = torch.randint(3, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
        targets = [position for start, n in zip(starts, lengths, strict=True) for position in range(start, start + n - 1)]
        positions = torch.tensor(targets)
        return Batch(ids, tuple(lengths), positions, ids[positions + 1], tuple(map(str, range(len(lengths)))))

    return build

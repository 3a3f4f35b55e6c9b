"""Tokens of an evaluation that pass together: as many as leave the plan's peak where it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.models.text.model import COUNTS
from lorakeet.planning.evaluation_batches import WIDER, tokens_within_peak
from lorakeet.planning.forecast_text_run import COUNT_BYTES
from lorakeet.planning.rehearse_text import FINAL, STEP
from lorakeet.runs.residency import MemoryPlan, Residency

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CODE = 2 * COUNTS * COUNT_BYTES


def planned(left: int) -> Residency[MemoryPlan]:
    """An evaluation that takes 100 bytes of a batch of the usual size, and `left` bytes less than training."""
    final = Phase(FINAL, {"runtime": 50, "base": 1000, "adapter": 10, "logits": 30, "scratch": 60, "allocator": 10})
    return Residency(plan=MemoryPlan(Forecast((Phase(STEP, {"base": final.bytes + left}), final))))


@pytest.mark.parametrize(("left", "times"), [(0, 1), (99, 1), (100, 2), (299, 2), (300, 4), (10_000, 4)])
def test_no_more_than_what_training_leaves(left: int, times: int) -> None:
    assert tokens_within_peak(planned(left), 1024, GPU) == 1024 * times
    assert tokens_within_peak(planned(left + CODE), 1024, CPU) == 1024 * times, "with the code of further shapes of products"
    assert WIDER == 4
    given = replace(planned(left), budget=Budget(1 << 40, "1TiB"))
    assert tokens_within_peak(given, 1024, GPU) == 1024, "a budget is kept as it was planned"


def test_where_nothing_is_planned_a_cpu_takes_more_and_a_budget_less() -> None:
    assert tokens_within_peak(Residency(), 512, CPU) == 2048
    assert tokens_within_peak(Residency(), 512, GPU) == 512
    assert tokens_within_peak(Residency(budget=Budget(1 << 30, "1GiB")), 512, CPU) == 512
    other = Residency(plan=MemoryPlan(Forecast((Phase("merge", {"base": 10**12}),))))
    assert tokens_within_peak(other, 512, CPU) == 512, "a plan without an evaluation"

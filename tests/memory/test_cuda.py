"""A budget on a CUDA device, with torch's own counts simulated: what is planned beside tensors, the limit, and what is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lorakeet.errors import EnvironmentProblem
from lorakeet.memory import cuda
from lorakeet.memory.budget import Budget
from lorakeet.memory.cuda import CONTEXT, SEGMENTS, WORKSPACES
from lorakeet.memory.usage import Usage

CARD = torch.device("cuda", 1)
GIB = 1 << 30


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """A device of 8 GiB, of which 5 are free and torch has 1; the limits that are set."""
    found: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: found.append((share, device)))
    return found


def test_torch_is_held_to_what_the_budget_leaves_beside_the_context(limits: list[tuple[float, torch.device]]) -> None:
    for budget, share in ((2 * GIB + CONTEXT, 0.25), (CONTEXT // 2, 0.0), (900 * GIB, 1.0)):
        cuda.limit_gpu_memory(CARD, budget)
        assert limits.pop() == (share, CARD)


@pytest.mark.usefixtures("limits")
def test_what_is_held_is_what_torch_took_and_the_context() -> None:
    assert cuda.gpu_peak_bytes(CARD) == 2 * GIB + CONTEXT
    assert cuda.bytes_beside_torch(CARD) == 2 * GIB
    assert cuda.gpu_bytes_left(CARD) == 6 * GIB + CONTEXT, "what is free, and what torch has"
    assert cuda.gpu_warning(CARD, Budget.parse("6GiB")) == "" and "8.00 GiB" in cuda.gpu_warning(CARD, Budget.parse("6.1GiB"))


def test_a_phase_has_its_tensors_the_context_and_room_around_them() -> None:
    moving = Usage(3 << 20, {"base": 2 << 20, "scratch": 1 << 20})
    (phase,) = cuda.phases_on_gpu({"train step": moving}, CONTEXT, returning=True)
    assert phase.kinds["runtime"] == CONTEXT and phase.kinds["base"] == 2 << 20
    around = SEGMENTS + WORKSPACES + (2 << 20) // 32 + (1 << 20) // 8
    assert phase.kinds["allocator"] == around and phase.bytes == (3 << 20) + CONTEXT + around
    assert [cuda.allocated_bytes(size) for size in (1, 10 << 20, (10 << 20) + 1)] == [2 << 20, 10 << 20, 12 << 20]


def test_the_device_is_that_of_the_tensors() -> None:
    assert cuda.cuda_device_of([torch.zeros(1)]) is None and cuda.cuda_device_of([]) is None
    assert cuda.cuda_device_of([SimpleNamespace(device=CARD)]) == CARD  # type: ignore[list-item]


def test_memory_that_is_met_is_reported_with_the_remedy() -> None:
    said = r"memory budget is 1KiB.* tried to allocate.* Raise it\."
    with pytest.raises(EnvironmentProblem, match=said), cuda.enforcing_gpu_budget(Budget.parse("1KiB"), "Raise it."):
        raise torch.OutOfMemoryError("tried to allocate 2 MiB.\nmore")
    said = r"^The device ran out of memory: tried to allocate 2 MiB\. Another program .* Close programs that use it"
    with pytest.raises(EnvironmentProblem, match=said), cuda.enforcing_gpu_budget(Budget(), ""):
        raise torch.OutOfMemoryError("tried to allocate 2 MiB.\nmore")

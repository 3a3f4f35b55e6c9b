"""What a budget bounds on a CUDA device, how torch is held to it, and what is planned there beside the tensors.

    held on the device = tensors + what torch's caching allocator keeps around them + the CUDA context

The allocator serves tensors of up to 1 MiB out of segments of 2 MiB, larger ones out of 20 MiB, and from 10 MiB on rounds up to
2 MiB (c10/cuda/CUDACachingAllocator.cpp); before it asks for more than its limit it gives whole free segments back. Its limit is
the budget without the context. No GPU was there: the figures below are chosen with room, and none of this was run on one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Phase, phase_at
from lorakeet.memory.usage import PERSISTENT, Usage

CONTEXT = 512 << 20  # bytes: driver and kernels, loaded as they are needed; some 300 MB are reported (pytorch/pytorch#107667)
WORKSPACES = 64 << 20  # bytes: cuBLAS and cuBLASLt, each the 32 MiB that NVIDIA recommends for Hopper; 4 MiB before it
SEGMENTS = 2 * (2 + 20) << 20  # bytes: of each kind two that are used in part
KEPT_SHARE = 1 / 32  # of what stays: at most 2 MiB of each large tensor
MOVING_SHARE = 1 / 8  # of what comes and goes: pieces of segments that nothing fits into
_ROUND = 2 << 20


def allocated_bytes(size: int) -> int:
    """What the allocator takes for a tensor of `size` bytes, 10 MiB or more."""
    return size + -size % _ROUND


def allocator_overhead(peak: Usage) -> int:
    """Bytes to count for the allocator around the tensors of `peak`, and for the libraries that work beside them."""
    kept = sum(size for kind, size in peak.kinds.items() if kind in PERSISTENT)
    return int(KEPT_SHARE * kept + MOVING_SHARE * (peak.bytes - kept)) + SEGMENTS + WORKSPACES


def phases_on_gpu(
    held: Mapping[str, Usage], runtime: int, *, returning: bool = False, trimmed_before: Collection[str] = ()
) -> tuple[Phase, ...]:
    """The phases at the peaks of a ledger, as memory/forecast gives them for a process: here of a CUDA device, beside `runtime`.

    Freed memory always goes back to where other tensors find it, whatever `returning` and `trimmed_before` say of the host's.
    """
    return tuple(phase_at(name, peak, runtime, allocator_overhead(peak)) for name, peak in held.items())


def cuda_device_of(tensors: Iterable[Tensor]) -> torch.device | None:
    """The CUDA device that they are on; None where they are not on one."""
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return device if device.type == "cuda" else None


def limit_gpu_memory(device: torch.device, budget: int) -> None:
    """Lets torch's allocator take no more of `device` than the budget leaves beside the context."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget - CONTEXT) / total), device)


def gpu_peak_bytes(device: torch.device) -> int:
    """The most bytes that the process held on `device`: what torch took, as it counts itself, and the context as planned."""
    return torch.cuda.max_memory_reserved(device) + CONTEXT


def bytes_beside_torch(device: torch.device) -> int:
    """Bytes of `device` that are used and are not torch's: this process's context, and other processes if there are any."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def gpu_warning(device: torch.device, budget: Budget) -> str:
    """A warning where `device` has less than the budget, or less of it free; else empty."""
    free, total = torch.cuda.mem_get_info(device)
    if budget.bytes <= free + torch.cuda.memory_reserved(device):
        return ""
    return (
        f"The memory budget is {budget}, but {device} has {bytes_text(total)}, of which {bytes_text(free)} are free: keeping it "
        "does not make the run fit."
    )


@contextmanager
def enforcing_gpu_budget(budget: Budget, remedy: str) -> Iterator[None]:
    """A context in which the limit of a budget on a CUDA device, where it is met, is an EnvironmentProblem with `remedy`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not budget:
            raise
        raise EnvironmentProblem(
            f"The memory budget is {budget}, and the run would go beyond it on its device, against its plan: "
            f"{str(error).splitlines()[0]} It was stopped there; please report the model and the settings. {remedy}"
        ) from error

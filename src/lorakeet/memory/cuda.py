"""The memory budget of a CUDA device: how torch is limited to it, and what a plan counts beside the tensors.

    memory in use = tensors + overhead of torch's caching allocator + the CUDA context

The allocator puts tensors of up to 1 MiB into segments of 2 MiB, larger ones into segments of 20 MiB, and rounds sizes from
10 MiB up to 2 MiB (c10/cuda/CUDACachingAllocator.cpp). Before it exceeds its limit it frees unused segments. The limit is the
budget without the context. The figures below are generous estimates; none of this was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lorakeet.errors import EnvironmentProblem, is_device_fault, is_out_of_memory
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Phase, phase_at
from lorakeet.memory.usage import PERSISTENT, Usage

CONTEXT = 512 << 20  # bytes: driver and kernels, loaded on demand; about 300 MB are reported (pytorch/pytorch#107667)
WORKSPACES = 64 << 20  # bytes: cuBLAS and cuBLASLt, each the 32 MiB that NVIDIA recommends for Hopper; 4 MiB before it
SEGMENTS = 2 * (2 + 20) << 20  # bytes: two partly used ones of each size
PERSISTENT_SHARE = 1 / 32  # of persistent tensors: at most 2 MiB of each large one
TEMPORARY_SHARE = 1 / 8  # of temporary tensors: fragmentation
_ROUND = 2 << 20


def allocated_bytes(size: int) -> int:
    """Returns the bytes allocated for a tensor of `size` bytes, 10 MiB or more."""
    return size + -size % _ROUND


def allocator_overhead(peak: Usage) -> int:
    """Returns the bytes to add for the allocator and the libraries' workspaces at `peak`."""
    persistent = sum(size for kind, size in peak.kinds.items() if kind in PERSISTENT)
    return int(PERSISTENT_SHARE * persistent + TEMPORARY_SHARE * (peak.bytes - persistent)) + SEGMENTS + WORKSPACES


def phases_on_gpu(
    peaks: Mapping[str, Usage], runtime: int, *, returning: bool = False, trimmed_before: Collection[str] = ()
) -> tuple[Phase, ...]:
    """Returns the phases of a CUDA device at the `peaks` of a ledger, beside `runtime` bytes (as memory/forecast.phases_of).

    `returning` and `trimmed_before` concern the host alone: torch's allocator always reuses freed memory.
    """
    return tuple(phase_at(name, peak, runtime, allocator_overhead(peak)) for name, peak in peaks.items())


def cuda_device_of(tensors: Iterable[Tensor]) -> torch.device | None:
    """Returns the CUDA device of the tensors; None if they are not on one."""
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return device if device.type == "cuda" else None


def limit_gpu_memory(device: torch.device, budget: int) -> None:
    """Limits torch's allocator on `device` to the budget without the context."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget - CONTEXT) / total), device)


def gpu_peak_bytes(device: torch.device) -> int:
    """Returns the peak of the process on `device` in bytes: torch's reserved memory, and the context as planned."""
    return torch.cuda.max_memory_reserved(device) + CONTEXT


def release_device_memory() -> None:
    """Returns what torch's allocator keeps and does not use to the CUDA device; does nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bytes_beside_torch(device: torch.device) -> int:
    """Returns the bytes in use on `device` outside torch: this process's context, and other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def gpu_bytes_left(device: torch.device) -> int:
    """Returns the bytes that this process may use on `device`, those that it has among them, with the context as planned."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) + CONTEXT


def gpu_warning(device: torch.device, budget: Budget) -> str:
    """Returns a warning if less than the budget is free on `device`; else an empty string."""
    free, total = torch.cuda.mem_get_info(device)
    if budget.bytes <= free + torch.cuda.memory_reserved(device):
        return ""
    return (
        f"The memory budget is {budget}, but {device} has {bytes_text(total)}, of which {bytes_text(free)} are free: a run "
        "within the budget may still not fit."
    )


LESS = "set a memory.budget, or lower train.micro_tokens or data.max_tokens"  # of training


def out_of_memory_text(error: BaseException, remedy: str = LESS) -> str:
    """What to say where a device has run out of memory, with torch's own words and what else would help than to close others."""
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    planned = " Another program may have taken some since it was planned." * (remedy == LESS)
    return f"The device ran out of memory: {said}.{planned} Close programs that use it, {remedy}."


def device_fault_text(error: BaseException, command: str = "") -> str:
    """What to say where a GPU has failed, with torch's own words, and the command to try again if it is known."""
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    again = f"Try again with: {command}" if command else "Run the command again"
    if "busy or unavailable" in said:
        return (
            f"The GPU cannot be used: {said}. Another process may hold it alone (compute mode EXCLUSIVE_PROCESS): see "
            f"nvidia-smi. Wait for its end, or choose another GPU with CUDA_VISIBLE_DEVICES. {again}."
        )
    return (
        f"The GPU failed: {said}. This process can no longer use it, and the operation that reports it may not be its cause. "
        f"{again}. If it fails again, set CUDA_LAUNCH_BLOCKING=1 in the environment, by which the traceback of --debug shows the "
        "operation, and report it. Whether the GPU itself is at fault, nvidia-smi and the system's log (Xid) say."
    )


@contextmanager
def enforcing_gpu_budget(budget: Budget, remedy: str) -> Iterator[None]:
    """A context that turns running out of a GPU's memory into EnvironmentProblem, with `remedy` if there is a budget. So it does
    with a GPU that failed."""
    try:
        yield
    except RuntimeError as error:
        if is_device_fault(error):
            raise EnvironmentProblem(device_fault_text(error)) from error
        if not is_out_of_memory(error):
            raise
        if not budget or budget.free:
            raise EnvironmentProblem(out_of_memory_text(error)) from error
        raise EnvironmentProblem(
            f"The memory budget is {budget}, and the run would exceed it on its device, contrary to its plan: "
            f"{str(error).splitlines()[0]} The run was stopped; please report the model and the settings. {remedy}"
        ) from error

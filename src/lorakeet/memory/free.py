"""What is free on a device now, as the bound of a run that was given no budget."""

from __future__ import annotations

import torch

from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import Budget, available_memory
from lorakeet.memory.cuda import gpu_bytes_left
from lorakeet.memory.measure import resident_bytes

MARGIN = 256 << 20  # bytes of a CUDA device: kernels that are loaded later than now, and windows that open meanwhile


def fits_now(size: int, device: torch.device) -> bool:
    """Whether `size` more bytes fit on a CUDA device now, beside all that is there; on other devices they are taken to."""
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size + MARGIN <= torch.cuda.mem_get_info(device)[0] + unused


def free_memory(device: torch.device) -> Budget:
    """What this process may use of `device`, that which it has among it; of a CUDA device less MARGIN.

    Plans count the CUDA context, the libraries' workspaces and the allocator's overhead (memory/cuda) within this.
    """
    if device.type == "cuda":
        left = max(0, gpu_bytes_left(device) - MARGIN)
        return Budget(left, bytes_text(left), str(device))
    left = available_memory()[0] + resident_bytes()
    return Budget(left, bytes_text(left), "this machine")

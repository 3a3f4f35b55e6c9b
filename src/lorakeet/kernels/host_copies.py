"""Copies from the host to a device that no one waits for: through pinned memory, and small ones together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies `tensor` to `device`. From the host to CUDA the copy is asynchronous, through pinned memory."""
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def together_on(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Arrays of one dtype as tensors on `device`. To CUDA they go over in one asynchronous copy, through pinned memory."""
    if device.type != "cuda":
        return [torch.from_numpy(each).to(device) for each in arrays]
    whole = to_device(torch.from_numpy(np.concatenate([each.reshape(-1) for each in arrays])), device)
    parts = torch.split(whole, [each.size for each in arrays])
    return [part.view(each.shape) for part, each in zip(parts, arrays, strict=True)]

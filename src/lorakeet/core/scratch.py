"""A buffer shared by all packed weights, into which each is dequantised where it is not multiplied as stored."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """A growing buffer for each device and dtype, lent as a matrix until the next request.

    Fake tensors, with which a step is traced, have buffers of their own; clear them after the trace.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device, object], Tensor] = {}

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of that shape; invalidates the tensor lent before."""
        size = shape[0] * shape[1]
        like = torch.empty(0, device=device)
        key = (dtype, device, getattr(like, "fake_mode", type(like)))  # the trace, if there is one
        held = self._buffers.get(key)
        if held is None or held.numel() < size:
            self._buffers.pop(key, None)
            with torch.inference_mode(False):  # else it could not be written outside of inference mode
                held = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)

    def clear(self) -> None:
        """Frees the memory."""
        self._buffers.clear()


SCRATCH = Scratch()

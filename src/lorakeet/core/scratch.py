"""One buffer that all packed weights share, into which each is brought back where it is not multiplied as it is."""

from __future__ import annotations

import torch
from torch import Tensor


def _world(tensor: Tensor) -> object:
    """What a tensor's numbers belong to: the trace that made it, or its plain type."""
    return getattr(tensor, "fake_mode", type(tensor))


class Scratch:
    """One growing buffer for each device and dtype, lent as a matrix until it is asked for again.

    Fake tensors, with which a step is traced, have buffers of their own; whoever traces clears them after it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device, object], Tensor] = {}

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of that shape; the tensor lent before is no longer valid."""
        size = shape[0] * shape[1]
        key = (dtype, device, _world(torch.empty(0, device=device)))
        held = self._buffers.get(key)
        if held is None or held.numel() < size:
            self._buffers.pop(key, None)
            with torch.inference_mode(False):  # or nobody could write to it who asks outside of that mode later
                held = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)

    def held(self) -> tuple[Tensor, ...]:
        """The buffers that are lent now: whoever has written down where they lie holds them."""
        return tuple(self._buffers.values())

    def clear(self) -> None:
        """Gives the memory back."""
        self._buffers.clear()


SCRATCH = Scratch()

"""Which trained tensors left the values that they started from, each expert of a stack on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ZERO = "zeros"
STACKED = 3  # dimensions of the A and B of stacked experts; those of no other pair have as many


@dataclass(frozen=True)
class StartValues:
    """Digests of trained tensors by name, one for each expert of a stack; tensors of zeros are known as such, in any shape."""

    digests: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> StartValues:
        """The present values of `parameters`; reads each number once."""
        return cls({name: tuple(map(_digest, _parts(tensor))) for name, tensor in parameters.items()})

    def moved(self, parameters: Mapping[str, Tensor]) -> dict[str, tuple[bool, ...]]:
        """By name, whether the tensor is another than at the start; of stacked experts each expert's part."""
        return {
            name: tuple(_digest(part) != start for part, start in zip(_parts(tensor), self.digests[name], strict=True))
            for name, tensor in parameters.items()
            if name in self.digests
        }


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    own = tensor.detach()
    return own.unbind(0) if own.dim() == STACKED else (own,)


def _digest(tensor: Tensor) -> str:
    if not tensor.any():
        return _ZERO
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()

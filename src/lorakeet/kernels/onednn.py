"""Dense weights in oneDNN's layout, for products of few tokens on a CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorakeet.kernels.protocol import Situation

NEEDS = "a matrix"


class OneDnnOrder:
    """A weight (out, in) in the opaque layout of oneDNN."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = self._product(x, self._weight, None, "none", [], "")
        return y

    def dense(self) -> Tensor:
        return self._weight.to_dense()  # type: ignore[no-any-return]


def why_not(situation: Situation) -> str:
    """Why oneDNN's layout cannot be used."""
    if situation.device.type != "cpu" or situation.rehearsed:
        return "it is a kernel for the CPU"
    if not situation.dtype.is_floating_point or not _works(situation.dtype):
        return f"oneDNN cannot reorder weights in {str(situation.dtype).removeprefix('torch.')} on this processor"
    return ""


def takes(weight: Tensor) -> bool:
    """True for a matrix."""
    return weight.dim() == 2


@cache
def _works(dtype: torch.dtype) -> bool:
    """True if oneDNN's layout works, tried on a small weight: the dtypes depend on the processor."""
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    weight = torch.linspace(-1, 1, 48 * 32).view(48, 32).to(dtype)
    try:
        order = OneDnnOrder(weight)
        found = order.product(weight[:3])
    except RuntimeError:
        return False
    return torch.equal(order.dense(), weight) and torch.allclose(found, torch.mm(weight[:3], weight.t()), rtol=0.02, atol=0.02)

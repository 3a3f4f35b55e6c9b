"""The grid of a GPTQ weight: a scale and a zero point for each group of input columns and each output row.

    W[r, c] = scale[g, r] · (code[r, c] − zero[g, r])        g = g_idx[c], code from 0 to 2^bits − 1

Scales are fp16, as in the files, and codes are chosen for the rounded scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 2.0**-24  # the smallest scale that fp16 holds


@dataclass(frozen=True)
class GptqGrid:
    """Scales and zero points of a weight (out, in), and the group of each column."""

    scales: Tensor  # (groups, out) fp16
    zeros: Tensor  # (groups, out) uint8
    g_idx: Tensor  # (in,) int32


def groups_in_order(columns: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """g_idx (columns,) for groups of `group_size` neighbouring columns; −1 is one group."""
    size = columns if group_size == -1 else group_size
    return (torch.arange(columns, device=device) // size).to(torch.int32)


def fit_group(weight: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale (out,) fp16 and zero point (out,) uint8 that cover one group, weight (out, columns) fp32.

    The range includes 0. Symmetric: the zero point is 2^(bits−1), the range ± the largest absolute value. A group of zeros gets
    the scale 1.
    """
    highest = 2**bits - 1
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    spread = high - low
    scale = torch.where(spread > 0, (spread / highest).clamp(min=_SMALLEST), 1.0).half()
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    zero = (-low / scale.float()).round().clamp(0, highest)
    return scale, zero.to(torch.uint8)


def codes_for(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, whole numbers in fp32 of the shape of `weight`; scale and zero are fp32 and broadcast to it."""
    return (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def quantise_to_nearest(weight: Tensor, bits: int, sym: bool, g_idx: Tensor, groups: int) -> tuple[Tensor, GptqGrid]:
    """Round-to-nearest: codes (out, in) uint8 and the grid, fitted group by group, of weight (out, in)."""
    rows, columns = weight.shape
    scales = torch.ones(groups, rows, dtype=torch.float16, device=weight.device)
    zeros = torch.zeros(groups, rows, dtype=torch.uint8, device=weight.device)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for group in range(groups):
        members = (g_idx == group).nonzero().squeeze(1)
        if len(members):
            part = weight[:, members].float()
            scales[group], zeros[group] = fit_group(part, bits, sym)
            scale, zero = scales[group].float()[:, None], zeros[group].float()[:, None]
            codes[:, members] = codes_for(part, scale, zero, bits).to(torch.uint8)
    return codes, GptqGrid(scales, zeros, g_idx)

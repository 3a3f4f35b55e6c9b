"""Codes and scales of GGUF blocks: steps and offsets of a block, other codes under its scales, and scales fitted to a weight.

Every type of quant/gguf is a code with a step and an offset for each group of 32 numbers (Q6_K: 16):

    x = step·code − offset        code from 0 to `highest`

    Q4_0, Q5_0, Q8_0      step d             offset d·(8, 16, 128)
    Q4_1, Q5_1            step d             offset −m
    Q4_K, Q5_K            step d·s           offset e·m
    Q6_K                  step d·s           offset 32·d·s
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.quant.gguf import BLOCK_TYPES, GgufBase, fp16_at, scales_and_minima

HIGHEST = {"Q4_0": 15, "Q4_1": 15, "Q5_0": 31, "Q5_1": 31, "Q8_0": 255, "Q4_K": 15, "Q5_K": 31, "Q6_K": 63}
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")
_SIX = 63  # largest scale and minimum of Q4_K and Q5_K
_MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
_CODES_AT = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8, "Q8_0": 2}
_FIFTH_AT = {"Q5_0": 2, "Q5_1": 4}


def steps(base: GgufBase) -> tuple[Tensor, Tensor]:
    """Step and offset of every group, (out, groups) fp32 each."""
    kind, rows = base.kind, base.shape[0]
    blocks = base.packed.view(-1, BLOCK_TYPES[kind].bytes)
    if kind in ("Q4_K", "Q5_K"):
        scales, minima = scales_and_minima(blocks[:, 4:16])
        step, offset = fp16_at(blocks, 0) * scales[:, :, 0], fp16_at(blocks, 2) * minima[:, :, 0]
    elif kind == "Q6_K":
        step = fp16_at(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
        offset = step * 32
    else:
        step = fp16_at(blocks, 0)
        offset = step * _MIDDLE[kind] if kind in _MIDDLE else -fp16_at(blocks, 2)
    return step.reshape(rows, -1), offset.reshape(rows, -1)


def with_codes(base: GgufBase, codes: Tensor) -> GgufBase:
    """A base with the scales of `base` and the given codes (out, in) uint8."""
    kind = base.kind
    block = BLOCK_TYPES[kind]
    found = GgufBase(base.shape, kind, device=base.device)
    found.packed.copy_(base.packed)
    blocks, own = found.packed.view(-1, block.bytes), codes.reshape(-1, block.size)
    n = len(blocks)
    if kind == "Q6_K":
        low = own.view(n, 2, 2, 64) & 15
        blocks[:, :128] = (low[:, :, 0] | (low[:, :, 1] << 4)).reshape(n, 128)
        high = own.view(n, 2, 4, 32) >> 4
        blocks[:, 128:192] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(n, 64)
    elif kind in K_TYPES:
        nibbles = own.view(n, 4, 2, 32) & 15
        blocks[:, -128:] = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(n, 128)
        if kind == "Q5_K":
            blocks[:, 16:48] = _bits(own.view(n, 8, 32).transpose(1, 2) >> 4)
    elif kind == "Q8_0":
        blocks[:, 2:] = own ^ 128  # code − 128 as a signed byte
    else:
        start = _CODES_AT[kind]
        blocks[:, start : start + 16] = (own[:, :16] & 15) | ((own[:, 16:] & 15) << 4)
        if kind in _FIFTH_AT:
            at = _FIFTH_AT[kind]
            blocks[:, at : at + 4] = _bits(own.view(n, 4, 8) >> 4)
    return found


def _bits(flags: Tensor) -> Tensor:
    """Packs flags (…, 8), each 0 or 1, to bytes (…), the first flag lowest."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags * weights).sum(-1, dtype=torch.uint8)


def fit_gguf_scales(weight: Tensor, kind: str) -> GgufBase:
    """Quantises `weight` (out, in) to the nearest values in blocks of type `kind`, with scales fitted to it.

    Simple types are written as by the gguf package. K types: each group's range, widened to hold 0, is divided evenly, and the
    ranges are rounded to the block's common steps. llama.cpp's quantiser searches for better ones.
    """
    base = GgufBase((weight.shape[0], weight.shape[1]), kind, device="cpu")
    if kind not in K_TYPES:
        base.store(weight)
        return base
    wide = weight.detach().float().cpu()
    if kind == "Q6_K":
        _fit_six(base, wide.reshape(-1, 16, 16))
    else:
        _fit_k(base, wide.reshape(-1, 8, 32))
    step, offset = steps(base)
    grouped = wide.view(len(wide), step.shape[1], -1)
    codes = nearest_codes(grouped, inverted(step)[:, :, None], offset[:, :, None], HIGHEST[kind])
    return with_codes(base, codes.to(torch.uint8).view(weight.shape))


def nearest_codes(numbers: Tensor, inverse: Tensor, offset: Tensor, highest: int) -> Tensor:
    """The nearest codes as whole numbers in fp32; `inverse` is 1/step (`inverted`)."""
    return torch.add(numbers, offset).mul_(inverse).round_().clamp_(0, highest)


def inverted(step: Tensor) -> Tensor:
    """1/step, or 0 for a step of 0, so that its codes are 0."""
    return torch.where(step == 0, 0.0, 1 / torch.where(step == 0, 1.0, step))


def _fit_k(base: GgufBase, groups: Tensor) -> None:
    """Writes d, e and the 6-bit scales and minima of Q4_K or Q5_K for groups (blocks, 8, 32)."""
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    step, offset = (high - low) / HIGHEST[base.kind], -low
    blocks = base.packed.view(len(groups), -1)
    parts = []
    for at, wanted in ((0, step), (2, offset)):
        common = (wanted.amax(1, keepdim=True) / _SIX).half()
        blocks[:, at : at + 2] = common.view(torch.uint8)
        common = common.float()
        ratio = torch.where(common > 0, wanted / torch.where(common > 0, common, 1.0), 0.0)
        parts.append(ratio.round().clamp(0, _SIX).to(torch.uint8))
    scales, minima = parts
    blocks[:, 4:8] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    blocks[:, 8:12] = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    blocks[:, 12:16] = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)


def _fit_six(base: GgufBase, groups: Tensor) -> None:
    """Writes d and the scales of Q6_K for groups (blocks, 16, 16): codes from −32 to 31 span each group's largest number."""
    step = groups.abs().amax(2) / 31
    common = (step.amax(1, keepdim=True) / 127).half()
    blocks = base.packed.view(len(groups), -1)
    blocks[:, 208:210] = common.view(torch.uint8)
    wide = common.float()
    ratio = torch.where(wide > 0, step / torch.where(wide > 0, wide, 1.0), 0.0)
    blocks[:, 192:208] = ratio.round().clamp(0, 127).to(torch.int8).view(torch.uint8)

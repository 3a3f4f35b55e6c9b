"""The block maxima of several NF4 weights, decoded together: three launches for all of them, where each weight takes two.

With double quantisation the largest absolute value of a block is a code of 8 bits (quant/nf4). A product on a GPU dequantises its
weight, and for that the weight's maxima. The weights of a decoder block are used one after the other. So the first of them
decodes the maxima of all, which stay until another block's are decoded: fp32, 1/16 of a byte for each number of one block in
blocks of 64. Each maximum has the bits that it has alone. **Not run on a GPU yet**: before the first use on a device, all
maxima are compared with the formula; where they differ, one warning says so, and each weight decodes its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorakeet.kernels.proof import difference_found

NESTED = 256  # block maxima that share one scale
LAUNCHES = 3  # the codes side by side, their numbers, and their means added
MOST = 32  # weights at once: torch joins up to 128 tensors in one launch, and each weight may bring one of filling


class MaximaCodes(NamedTuple):
    """The codes (blocks,) of a weight's block maxima in uint8, a scale for each 256 of them, and their mean, a scalar; fp32."""

    codes: Tensor
    scales: Tensor
    mean: Tensor

    @property
    def can_be_joined(self) -> bool:
        """Whether changes of the buffers can be seen: not of those that were made in inference mode."""
        return not any(buffer.is_inference() for buffer in self)


class SharedMaxima:
    """The block maxima of weights on one device; `dynamic` (256,) are the numbers of the codes, fp32.

    Copies of a weight, and weights whose buffers were moved or changed, get None: they decode their own.
    """

    def __init__(self, weights: Sequence[MaximaCodes], dynamic: Tensor) -> None:
        self.weights, self.dynamic = list(weights), dynamic
        self._versions = [[buffer._version for buffer in weight] for weight in weights]
        filling = torch.zeros(NESTED, dtype=torch.uint8, device=dynamic.device)
        self._parts: list[Tensor] = []
        self._places: list[slice] = []
        start = 0
        for codes, _, _ in weights:
            missing = -len(codes) % NESTED  # each weight begins with a scale of its own
            self._parts += [codes, filling[:missing]] if missing else [codes]
            self._places.append(slice(start, start + len(codes)))
            start += len(codes) + missing
        self._scales = torch.cat([weight.scales for weight in weights])
        self._means = torch.cat([weight.mean.expand(len(weight.scales)) for weight in weights])[:, None]

    def of(self, number: int, weight: MaximaCodes) -> Tensor | None:
        """The block maxima (blocks,) of the weight of that number in fp32, valid if its buffers are still those of `weight`."""
        known = zip(self.weights[number], weight, self._versions[number], strict=True)
        if not all(one is other and one._version == version for one, other, version in known) or not self._agrees():
            return None
        whole = LAST.get(self)
        if whole is None:
            LAST.clear()  # before the next ones take memory
            whole = LAST[self] = self.decode()
        return whole[self._places[number]]

    def decode(self) -> Tensor:
        """The maxima of all weights, at their places."""
        nested = torch.ops.bitsandbytes.dequantize_blockwise.default
        with torch.inference_mode(False), torch.no_grad():
            found: Tensor = nested(torch.cat(self._parts), self._scales, self.dynamic, NESTED, torch.float32)
            return found.view(-1, NESTED).add_(self._means).view(-1)

    def _agrees(self) -> bool:
        device = self.dynamic.device
        if device not in AGREED:
            said = difference_found(self._difference, of_any_kind=True)
            if said:
                logging.getLogger("lorakeet").warning(
                    "bitsandbytes %s. Each NF4 weight decodes its own block maxima, in more launches. Please report it.", said
                )
            AGREED[device] = not said
        return AGREED[device]

    def _difference(self) -> str:
        """How the maxima differ from the formula by more than a rounding; empty if they do not."""
        found = self.decode()
        for (codes, scales, mean), place in zip(self.weights, self._places, strict=True):
            levels = self.dynamic[codes.int()]
            expected = levels * scales.repeat_interleave(NESTED)[: len(codes)] + mean
            if not torch.allclose(found[place], expected, rtol=torch.finfo(torch.float32).eps, atol=0.0):
                worst = float((found[place] - expected).abs().max())
                return f"decodes the block maxima of {len(self.weights)} NF4 weights otherwise than their formula: by {worst:.3g}"
        return ""


def decoded_bytes(block_counts: Sequence[int]) -> int:
    """Bytes of the maxima of weights with so many blocks each, as they stay while those of one decoder block are used."""
    whole = [-(-count // NESTED) * NESTED for count in block_counts]
    return torch.float32.itemsize * max((sum(whole[first : first + MOST]) for first in range(0, len(whole), MOST)), default=0)


LAST: WeakKeyDictionary[SharedMaxima, Tensor] = WeakKeyDictionary()  # the maxima that were decoded last, for as long as they are
AGREED: dict[torch.device, bool] = {}

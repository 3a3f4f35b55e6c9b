"""What bases say of themselves to Triton kernels."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.base import DenseBase, TransposedBase
from lorakeet.quant.int8 import Int8Base
from tiny.triton_device import needs_triton


def test_kernels_are_used_on_request_only() -> None:
    assert DenseBase(nn.Linear(4, 6)).kernels is None and Int8Base((6, 4)).kernels is None


def test_a_base_without_a_kernel_says_so() -> None:
    assert Int8Base((6, 4)).in_tiles() is None


@needs_triton
def test_plain_weights_are_read_where_they_lie() -> None:
    module = nn.Linear(4, 6)
    tiles = DenseBase(module).in_tiles()
    assert tiles is not None and tiles.shape == (6, 4) and tiles.how == (4, 1)
    assert tiles.tensors[0].data_ptr() == module.weight.data_ptr() and not tiles.tensors[0].requires_grad
    conv = TransposedBase(Conv1D(6, 4)).in_tiles()
    assert conv is not None and conv.shape == (6, 4) and conv.how == (1, 6)
    module.weight.data = torch.empty(6, 8)[:, ::2]
    assert DenseBase(module).in_tiles() is None

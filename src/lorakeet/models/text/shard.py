"""Shards the frozen blocks of a text model over processes with torch's FSDP2: each is whole only while it computes.

    in memory    1/n of every block in each process; embeddings, head, adapter and optimizer state whole
    forward      a block's n shards are gathered, the block computes, the gathered weights are freed
    backward     the same from the last block to the first; nothing is reduced, since no frozen weight gets a gradient

Packed weights are sharded in packed form, so that 4 bits a weight are sent. Every process must run the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models import modules
from lorakeet.models.text.model import TextModel
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.stack import PackedStack


def shard_blocks(text: TextModel, count: int, device: torch.device) -> TextModel:
    """Shards every block over the `count` processes of torch's default group, moves the model to `device` and returns it.

    The adapter must be in the model. Raises ConfigError if the model has no list of blocks, and EnvironmentProblem if this
    torch cannot shard packed weights.
    """
    prefix, blocks = modules.block_prefix(text.model, text.family)
    if not blocks:
        kind = text.model.config.model_type
        raise ConfigError(f"train.shard shards a model's blocks, but this '{kind}' model has no list of blocks. Leave it out.")
    mesh = init_device_mesh(device.type, (count,))
    sharded: list[FSDPModule] = []
    for number in range(blocks):
        # the original, whose hooks a TrainedBlock calls
        block = modules.unwrapped(cast(nn.Module, modules.find(text.model, f"{prefix}.{number}")))
        for base in block.modules():
            if isinstance(base, (PackedBase, PackedStack)):  # FSDP2 shards only parameters: its buffers become frozen ones
                buffers = [(name, buffer) for name, buffer in base.named_buffers(recurse=False) if buffer.dim() and len(buffer)]
                for name, buffer in buffers:
                    delattr(base, name)
                    base.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
        with _packed_weights_refused():
            ignored = {each for each in block.parameters() if each.requires_grad or not each.dim()}
            sharded.append(fully_shard(block, mesh=mesh, ignored_params=ignored))
    for lower, upper in pairwise(sharded):  # a block is gathered while its neighbour computes
        lower.set_modules_to_forward_prefetch([upper])
        upper.set_modules_to_backward_prefetch([lower])
    decoder = modules.decoder_of(text.model)
    outside = {each for each in decoder.parameters() if not isinstance(each, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=outside)  # it shards nothing itself; blocks below it are prefetched
    text.model.to(device)
    return replace(text, device=device, sharded=True)


@contextmanager
def _packed_weights_refused() -> Iterator[None]:
    """FSDP2 refused frozen integer parameters before https://github.com/pytorch/pytorch/issues/177844 was fixed."""
    try:
        yield
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise EnvironmentProblem(
            f"train.shard cannot shard packed weights with torch {torch.__version__} ({error}). Install torch 2.13 or newer, or "
            "set model.quantize to none."
        ) from error


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole tensor of one that may be sharded; a collective call, made by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

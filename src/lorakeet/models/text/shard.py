"""The frozen blocks of a text model parted over processes by torch's FSDP2: each is whole only while it computes.

    in memory    1/n of every block in each process; embeddings, head, adapter and optimizer whole
    forward      a block's n parts are gathered, the block computes, the parts are let go again
    backward     the same from the last block to the first; nothing is sent back, for no gradient reaches a frozen weight

Packed weights are parted as the codes that they are, so that 4 bits a weight travel. Every process must run the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models import modules
from lorakeet.models.text.model import TextModel
from lorakeet.quant.packed import PackedBase


def part_blocks(text: TextModel, count: int, device: torch.device) -> None:
    """Moves the model to `device`, of which each of the `count` processes of torch's default group keeps its part of every block.

    The adapter must be in its place. Raises ConfigError where the model has no list of blocks, and EnvironmentProblem where this
    torch cannot part packed weights.
    """
    prefix, blocks = modules.block_prefix(text.model, text.family)
    if not blocks:
        kind = text.model.config.model_type
        raise ConfigError(f"train.shard parts a model's blocks, but in this '{kind}' model none were found. Leave it out.")
    mesh = init_device_mesh(device.type, (count,))
    for number in range(blocks):
        block = modules.bare(cast(nn.Module, modules.find(text.model, f"{prefix}.{number}")))  # whose hooks a TrainedBlock heeds
        _codes_as_parameters(block)
        with _packed_weights_refused():
            fully_shard(block, mesh=mesh, ignored_params={held for held in block.parameters() if not _can_be_parted(held)})
    decoder = text.model.get_decoder()
    outside = {held for held in decoder.parameters() if not isinstance(held, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=outside)  # it parts nothing itself; blocks below it are fetched ahead
    text.model.to(device)
    text.device, text.gathers = device, True


@contextmanager
def _packed_weights_refused() -> Iterator[None]:
    """FSDP2 took every parameter for one that is trained before https://github.com/pytorch/pytorch/issues/177844 was mended."""
    try:
        yield
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise EnvironmentProblem(
            f"train.shard cannot part packed weights with torch {torch.__version__} ({error}). Install torch 2.13 or newer, or "
            "set model.quantize to none."
        ) from error


def whole(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that may be parted; all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _can_be_parted(parameter: nn.Parameter) -> bool:
    return not parameter.requires_grad and parameter.dim() > 0


def _codes_as_parameters(block: nn.Module) -> None:
    """FSDP2 parts parameters alone: the buffers of packed weights become frozen ones, under the same names."""
    for base in block.modules():
        if isinstance(base, PackedBase):
            for name, buffer in [(name, buffer) for name, buffer in base.named_buffers(recurse=False) if buffer.dim() > 0]:
                delattr(base, name)
                base.register_parameter(name, nn.Parameter(buffer, requires_grad=False))

"""Digests of all frozen tensors of a model, without adapters: training must not change them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakeet.models.modules import original_modules
from lorakeet.models.text.shard import whole


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """Returns the SHA-256 of each frozen parameter and saved buffer of the model, by its path without adapters.

    Buffers that no file holds, such as rotary frequencies, are computed; some models compute them again in a pass. Reads every
    weight once: about a second per GB. Streamed weights, which are on the meta device, are left out. For a sharded
    model (models/text/shard) it is a collective call.
    """
    found: dict[str, str] = {}
    for path, module in original_modules(model):
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not tensor.is_meta and leaf not in module._non_persistent_buffers_set:
                found[f"{path}.{leaf}" if path else leaf] = _digest(tensor.detach())
    return found


def changed_tensors(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns the names of tensors whose digests differ or that are in only one of the two, sorted."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def _digest(tensor: Tensor) -> str:
    tensor = whole(tensor)
    flat = tensor.cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()

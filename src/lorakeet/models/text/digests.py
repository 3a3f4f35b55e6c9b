"""What training must not change: a digest of every frozen number of a model, its adapters left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakeet.models.modules import original_modules
from lorakeet.models.text.shard import whole


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of each frozen parameter and buffer of the model, by its path as it was before adapters.

    Reads every weight once: about a second for each gigabyte. A model that is streamed from disk has no numbers in memory; what
    is on the meta device is left out. Where processes have parted the model (models/text/shard), all must ask together.
    """
    found: dict[str, str] = {}
    for path, module in original_modules(model):
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not tensor.is_meta:
                found[f"{path}.{leaf}" if path else leaf] = _digest(tensor.detach())
    return found


def changed_tensors(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The tensors whose digest is another one, or that are in one of the two alone, sorted by name."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def _digest(tensor: Tensor) -> str:
    tensor = whole(tensor)
    flat = tensor.cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()

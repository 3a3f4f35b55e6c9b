"""What sd-scripts and LyCORIS compute with a LoRA file, written from the description of the format, without code of either.

    sd-scripts   each Linear and Conv2d has a key: PREFIX_ and its path with underscores. A module gets a pair if the file has
                 KEY.lora_down.weight, whose rows are the rank; alpha is that of the file, and the rank where it is missing or 0.
                 ΔW = alpha/rank · up·down. What has no place in the network is ignored; another shape is an error.
    LyCORIS      the same; KEY.lora_mid.weight makes a convolution of Tucker form, KEY.dora_scale gives each row of W + ΔW its
                 length (or each column, if its first size is 1). KEY.hada_…, KEY.lokr_… and KEY.diff… are other changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

OTHERS = ("hada_", "lokr_", "diff", "oft_", "w_norm", "b_norm", "lora_magnitude")


class NotComputed(Exception):
    """The programs refuse the file, or it is of a kind that this oracle leaves out."""


def weights_after(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weight of every module by key, as the programs compute it, fp64."""
    found: dict[str, Tensor] = {}
    for key, module in modules.items():
        own = {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
        if any(name.startswith(OTHERS) for name in own):
            raise NotComputed(key)
        found[key] = _weight_after(module, own)
    return found


def _weight_after(module: nn.Module, own: Mapping[str, Tensor]) -> Tensor:
    weight = module.weight.detach().double()
    if "lora_down.weight" not in own:
        return weight
    down = own["lora_down.weight"].double()
    rank = down.shape[0]
    alpha = own.get("alpha", torch.tensor(float(rank))).double()
    if alpha.numel() != 1 or alpha.dim() > 1:
        raise NotComputed("alpha")
    scale = (float(alpha) or rank) / rank
    up = own.get("lora_up.weight", torch.zeros(weight.shape[0], rank, *[1] * (weight.dim() - 2))).double()
    core = own.get("lora_mid.weight")
    kernel = tuple(weight.shape[2:])
    expected = (rank, weight.shape[1], *(kernel if core is None else [1] * len(kernel)))
    if tuple(down.shape) != expected or tuple(up.shape) != (weight.shape[0], rank, *[1] * len(kernel)):
        raise NotComputed("shape")
    if core is not None:
        if tuple(core.shape) != (rank, rank, *kernel):
            raise NotComputed("shape")
        down = torch.einsum("rskl,sikl->rikl", core.double(), down.expand(-1, -1, *kernel))
    changed = weight + scale * torch.tensordot(up.reshape(weight.shape[0], rank), down, dims=1)
    lengths = own.get("dora_scale")
    if lengths is None:
        return changed
    by_row, inner = lengths.shape[:1] == weight.shape[:1], [1] * (weight.dim() - 2)
    if tuple(lengths.shape) != ((weight.shape[0], 1, *inner) if by_row else (1, weight.shape[1], *inner)):
        raise NotComputed("shape")
    flat = changed.flatten(1) if by_row else changed.transpose(0, 1).flatten(1)
    norm = flat.norm(dim=1)
    return changed * lengths.double() / (norm.reshape(-1, *[1] * (weight.dim() - 1)) if by_row else norm.reshape(lengths.shape))

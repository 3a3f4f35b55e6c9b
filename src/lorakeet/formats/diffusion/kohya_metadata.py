"""The metadata that A1111's, ComfyUI's and kohya's tools read from a LoRA file, made if it is missing.

    ss_network_module        networks.lora, .lora_flux, .lora_sd3; lycoris.kohya for DoRA, which those do not read
    ss_network_dim, _alpha   rank and alpha of the linear modules, "Dynamic" if they differ
    ss_network_args          {"conv_dim", "conv_alpha"} of convolutions above 1×1, as LoCon trains them
    ss_base_model_version    sd_v1, sd_v2, sdxl_base_v1-0, sd3 or flux1; ss_v2 is True for SD 2.x. A1111 decides by these two
    sshs_model_hash          SHA-256 of the tensors' bytes, by which A1111 and model sites identify a file

Existing metadata is kept, except for numbers that the tensors contradict (an adapter that was compressed since). modelspec.…
needs a title and a date, which are unknown here, so it is kept but not made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakeet.core.adapter import Pair
from lorakeet.formats.components import component_of
from lorakeet.formats.diffusion.kohya_keys import Family
from lorakeet.formats.diffusion.transformer_names import TransformerFamily
from lorakeet.formats.files.safetensors_file import bytes_of_tensor, in_order

HASH = "sshs_model_hash"
_DYNAMIC = "Dynamic"
_SD2 = 1024  # width of the text that SD 2.x attends to, and of its text encoder; SD 1.x has 768
_SD1 = 768
_MODULES = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
_VERSIONS = {"sdxl": "sdxl_base_v1-0", "flux": "flux1", "sd3": "sd3"}


def network_metadata(
    pairs: Mapping[str, Pair],
    alpha: float,
    *,
    family: Family | TransformerFamily,
    known: Mapping[str, str],
    unet: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata of a file of `pairs` that is written with `alpha` for all or most of them; `known` is kept.

    `unet`: the configuration of the base's UNet, empty if unknown.
    """
    plain = [pair for pair in pairs.values() if not _spatial(pair)] or list(pairs.values())
    ranks = {pair.rank for pair in pairs.values()}
    dora = any(pair.magnitude is not None for pair in pairs.values())
    made = {
        "ss_network_module": "lycoris.kohya" if dora else _MODULES.get(family, "networks.lora"),
        "ss_network_dim": _one({pair.rank for pair in plain}),
        "ss_network_alpha": repr(alpha),
        **_network_args(pairs, alpha, dora=dora),
        **_version(pairs, family, unet),
    }
    true = {
        "ss_network_dim": {str(rank) for rank in ranks} | {made["ss_network_dim"]},
        "ss_network_alpha": {f"{alpha:g}", repr(alpha)},
    }
    kept = {key: text for key, text in known.items() if key not in true or text in true[key]}
    return {**made, **kept}


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in the order of the file, as A1111 computes it."""
    total = hashlib.sha256()
    for name in in_order({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}):
        total.update(bytes_of_tensor(tensors[name]))
    return total.hexdigest()


def _spatial(pair: Pair) -> bool:
    """True if the pair is a convolution above 1×1."""
    return pair.kind == "conv2d" and pair.A.shape[2:].numel() > 1


def _one(ranks: set[int]) -> str:
    return str(ranks.pop()) if len(ranks) == 1 else _DYNAMIC


def _network_args(pairs: Mapping[str, Pair], alpha: float, *, dora: bool) -> dict[str, str]:
    found: dict[str, str] = {"algo": "lora", "dora_wd": "True"} if dora else {}
    ranks = {pair.rank for pair in pairs.values() if _spatial(pair)}
    if len(ranks) == 1:
        found |= {"conv_dim": _one(ranks), "conv_alpha": repr(alpha)}
    return {"ss_network_args": json.dumps(found)} if found else {}


def _version(pairs: Mapping[str, Pair], family: Family | TransformerFamily, unet: Mapping[str, Any]) -> dict[str, str]:
    """The Stable Diffusion version; empty if the widths do not distinguish 1.x and 2.x."""
    if family != "sd1":
        return {"ss_base_model_version": _VERSIONS[family], "ss_v2": "False"}
    widths = {unet["cross_attention_dim"]} if isinstance(unet.get("cross_attention_dim"), int) else set()
    for path, pair in pairs.items():
        if path.endswith(("attn2.to_k", "attn2.to_v")) or (component_of(path) == "text_encoder" and path.endswith("_proj")):
            widths.add(pair.A.shape[1])
    known = widths & {_SD1, _SD2}
    if known == {_SD2}:
        return {"ss_base_model_version": "sd_v2", "ss_v2": "True"}
    return {"ss_base_model_version": "sd_v1", "ss_v2": "False"} if known == {_SD1} else {}

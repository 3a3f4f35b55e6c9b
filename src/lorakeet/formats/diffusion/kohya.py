"""Kohya's (A1111's, ComfyUI's) LoRA files of Stable Diffusion 1.x, 2.x, SDXL, SD3 and FLUX; LyCORIS files share their keys.

    PREFIX_MODULE.lora_down.weight   (rank, in), for a convolution (rank, in, k, k)
    PREFIX_MODULE.lora_up.weight     (out, rank), for a convolution (out, rank, 1, 1)
    PREFIX_MODULE.alpha              a number; scale = alpha/rank of this module; without any, the scale is 1.
                                     Written with one value for all, and other scales multiplied into lora_up:
                                     diffusers 0.42 loads differing alphas of attention and text encoder wrongly.
                                     Never 0, which sd-scripts reads as the rank: there lora_up is 0
    PREFIX_MODULE.dora_scale         (out, 1) or (out, 1, 1, 1)
    PREFIX_MODULE.lora_mid.weight    (rank, rank, k, k): a convolution in Tucker form, multiplied into lora_down when read

PREFIX is lora_unet, lora_te (SD 1.x), lora_te1 and lora_te2 (SDXL). MODULE is the path with underscores, for SDXL's UNet in
the names of Stability's own code, for SD3 and FLUX in those of their original checkpoints, whose matrices may be several of ours
(formats/diffusion/kohya_transformer; each module keeps its alpha there). Also read: lora_transformer_MODULE in diffusers' names,
as OneTrainer writes it, and `diffusion_model.MODULE` with dots, as ComfyUI does. Metadata (ss_*, modelspec.*) is kept, but for
hashes and numbers that the tensors contradict (an adapter that was compressed since), and made where it is missing:

    ss_network_module        networks.lora, .lora_flux, .lora_sd3; lycoris.kohya for DoRA, which those do not read
    ss_network_dim, _alpha   rank and alpha of the linear modules, "Dynamic" if they differ
    ss_network_args          {"conv_dim", "conv_alpha"} of convolutions above 1×1, as LoCon trains them
    ss_base_model_version    sd_v1, sd_v2, sdxl_base_v1-0, sd3 or flux1; ss_v2 is True for SD 2.x. A1111 decides by these two
    sshs_model_hash          SHA-256 of the tensors' bytes, by which A1111 and model sites identify a file

modelspec.… needs a title and a date, which are unknown here, so it is kept but not made.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import Kind, alpha_for
from lorakeet.errors import ConfigError, DataError, Problems, nearest, reader
from lorakeet.formats.adapter_format import Say
from lorakeet.formats.components import component_of, in_transformer
from lorakeet.formats.compress import CompressionTarget, fit_pair
from lorakeet.formats.diffusion import lycoris
from lorakeet.formats.diffusion.kohya_keys import (
    FAMILY_KEY,
    Family,
    TransformerFamily,
    diffusion_family,
    flat,
    flat_keys,
    kohya_key,
    ldm_keys,
    of_keys,
    transformer_family,
    transformer_keys,
    unet_modules,
)
from lorakeet.formats.diffusion.kohya_transformer import changes_of_module, keyed, of_module, unread_by_diffusers
from lorakeet.formats.files.base_model import BaseModel
from lorakeet.formats.files.safetensors_file import bytes_of_tensor, in_order, open_safetensors, save_tensors
from lorakeet.formats.files.tensors import factor_problem, missing_slots, read_tensors
from lorakeet.formats.limits import check_supported, metadata_without_peft

NAME, SUFFIX, WEIGHTS, MAGIC = "kohya", ".safetensors", "", b""  # as `AdapterFormat` says
_COMFY, _T5 = "diffusion_model.", "lora_te3_"
PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", _T5, "lora_transformer_", _COMFY)
_DOWN, _UP, _MID = "lora_down", "lora_up", "lora_mid"
SLOTS = (_DOWN, _UP, _MID, "alpha", "dora_scale", *lycoris.LOHA, *lycoris.LOKR)
_SPELLED = {f"{slot}.weight" if slot in (_DOWN, _UP, _MID) else slot: slot for slot in SLOTS}  # sd-scripts ignores others
_LINEAR_TEXTS = (1024, 2048)  # width of the texts of UNets whose projections are linear
_SD1, _SD2 = 768, 1024  # width of the text that SD 1.x and 2.x attend to, and of their text encoder
_NETWORKS = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
_VERSIONS = {"sdxl": "sdxl_base_v1-0", "flux": "flux1", "sd3": "sd3"}
HASH = "sshs_model_hash"
_HASHES = ("sshs_legacy_hash", "modelspec.hash_sha256")  # of a whole file; the one of the tensors is made anew


def owns(tensor: str) -> bool:
    """True for the names of kohya's and LyCORIS's tensors."""
    return tensor.startswith(PREFIXES)


@reader("an adapter")
def read(
    path: Path, /, *, base: BaseModel | None = None, compression: CompressionTarget | None = None, say: Say = print
) -> Adapter:
    """The adapter in the file `path`, with components in its paths. LoHa and LoKr need `compression`; `say` gets its errors.

    DataError lists everything that cannot be understood; nothing is dropped.
    """
    file = open_safetensors(path)
    problems = Problems(f"The adapter in {path} cannot be read", DataError)
    groups = _groups(read_tensors(file, problems), path, problems)
    _check_alphas(groups, path, problems)
    flat_of_base = flat_keys(() if base is None else base.weights)
    known = {**transformer_keys(), **{key: (path,) for key, path in flat_of_base.items()}}  # modules by key
    pairs: dict[str, Pair] = {}
    dense: dict[str, Mapping[str, Tensor]] = {}
    for key, slots in groups.items():
        modules = known.get(key, ())
        if not modules:
            problems.add(f"{path}: {_unknown(key, known, base)}")
        elif taken := [one for one in modules if one in pairs or any(one in known[other] for other in dense)]:
            problems.add(f"{path}: {key} is a second spelling of {taken[0]}, which has its tensors already.")
        elif lycoris.is_dense(slots):
            if extra := lycoris.not_understood(slots):
                problems.add(_extra_message(path, key, slots, extra))
            dense[key] = slots
        elif isinstance(pair := _pair(modules[0] if len(modules) == 1 else key, slots), str):
            problems.add(f"{path}: {pair}")
        elif isinstance(found := of_module(key, modules, pair), str):
            problems.add(f"{path}: {found}")
        else:
            pairs |= found
    problems.raise_if_any()
    if dense:
        changes = {key: (known[key], slots) for key, slots in dense.items()}
        pairs |= _compressed(path, changes, compression, base, say, linear=_linear_projections(groups))
    metadata = {key: value for key, value in file.metadata.items() if key not in (HASH, *_HASHES, "format")}
    if family := _spelled(groups, pairs):
        metadata[FAMILY_KEY] = family
    if not any("alpha" in slots for slots in groups.values()):
        say(f"{path} has no alpha for any module; by kohya's rule every scale is 1.")
    if dropped := sorted(set(file.metadata) & set(_HASHES)):
        say(f"Left out {', '.join(dropped)}: hashes of a file that is written anew.")
    return Adapter(dict(sorted(pairs.items())), base=metadata.get("ss_sd_model_name", ""), metadata=metadata)


def _unknown(key: str, known: Iterable[str], base: BaseModel | None) -> str:
    if key.startswith(_T5):
        return f"{key} is a pair of T5, a text encoder that is never adapted here. Take the keys {_T5}… out of the file."
    hint = "" if base else " If the base has other modules, name its folder with --base."
    return f"{key} is no module of Stable Diffusion 1.x, SDXL, SD3 or FLUX.{nearest(key, known)}{hint}"


def _extra_message(path: Path, key: str, slots: Mapping[str, Tensor], extra: Iterable[str]) -> str:
    algorithm = lycoris.algorithm(slots)
    found = ", ".join(f"{slot} {tuple(slots[slot].shape)}" for slot in extra)
    return (
        f"{path}: {key} is {algorithm}, but has tensors that are not understood beside it: {found}. They would be lost; expected "
        f"the tensors of one {algorithm} and alpha alone. Train the adapter again without them, or bake it into its base."
    )


def _spelled(groups: Iterable[str], paths: Iterable[str]) -> str:
    """The family by the spelling of the keys, or an empty string.

    lora_te1 alone does not decide: diffusers writes it for SD 1.x too, whose UNet has modules that SDXL's lacks.
    """
    keys = list(groups)
    if any(in_transformer(path) for path in paths):
        return of_keys(keys) or ""
    if any(key.startswith("lora_te_") for key in keys):
        return "sd1"
    if any(key.startswith("lora_te2_") or key in ldm_keys() for key in keys):
        return "sdxl"
    unet = {path.partition(".")[2] for path in paths if path.startswith("unet.")}
    return "sdxl" if any(key.startswith("lora_te1_") for key in keys) and unet <= unet_modules("sdxl") else ""


def _groups(tensors: Mapping[str, Tensor], path: Path, problems: Problems) -> dict[str, dict[str, Tensor]]:
    """The tensors by module key and slot."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, slot = _key_and_slot(name)
        if key.startswith(PREFIXES) and slot in _SPELLED:
            groups.setdefault(key, {})[_SPELLED[slot]] = tensor
        else:
            hint = nearest(slot, _SPELLED)
            problems.add(f"{path}: {name} {tuple(tensor.shape)} is a kind of tensor that is not known here.{hint}")
    return groups


def _key_and_slot(name: str) -> tuple[str, str]:
    """The module's flat key, and the slot of the tensor."""
    if not name.startswith(_COMFY):
        key, _, slot = name.partition(".")
        return key, slot
    ending = ".weight" if name.endswith(".weight") else ""
    module, _, slot = name.removeprefix(_COMFY).removesuffix(ending).rpartition(".")
    return f"lora_unet_{flat(module)}", {"lora_A": _DOWN, "lora_B": _UP}.get(slot, slot) + ending


def _check_alphas(groups: Mapping[str, Mapping[str, Tensor]], path: Path, problems: Problems) -> None:
    without = [key for key, slots in groups.items() if "alpha" not in slots]
    if without and len(without) < len(groups):
        problems.add(
            f"{path}: {len(without)} of {len(groups)} modules have no alpha ({', '.join(without[:3])}), so their scale is "
            "unknown. Kohya writes one for each; fetch the file again."
        )
    for key, slots in groups.items():
        if "alpha" in slots and slots["alpha"].numel() != 1:
            problems.add(f"{path}: {key}.alpha has the shape {tuple(slots['alpha'].shape)}; expected one number.")
        elif "alpha" in slots and float(slots["alpha"]) == 0:
            problems.add(
                f"{path}: {key}.alpha is 0, which sd-scripts and LyCORIS read as the rank and other programs as no change. Write "
                "the alpha that is meant into the file, or take the module out."
            )


def _alpha(slots: Mapping[str, Tensor]) -> float | None:
    return float(slots["alpha"]) if "alpha" in slots and slots["alpha"].numel() == 1 else None


def _pair(module: str, slots: Mapping[str, Tensor]) -> Pair | str:
    if missing := missing_slots(module, slots, (_DOWN, _UP)):
        return missing
    A, B = slots[_DOWN], slots[_UP]
    if (core := slots.get(_MID)) is not None:
        if core.dim() != 4 or A.flatten(1).shape[0] != core.shape[1]:
            return f"{module} has lora_mid {tuple(core.shape)} and lora_down {tuple(A.shape)}, which do not go together."
        A = torch.einsum("rpkl,pi->rikl", core, A.flatten(1)).contiguous()
    if wrong := factor_problem(module, A, B):
        return wrong
    kind: Kind = "conv2d" if A.dim() == 4 else "linear"
    alpha, magnitude = _alpha(slots), slots.get("dora_scale")
    if magnitude is not None and (magnitude.shape[:1] != B.shape[:1] or magnitude.numel() != B.shape[0]):
        return f"{module} has dora_scale {tuple(magnitude.shape)}; only one length for each of the {B.shape[0]} rows can be read."
    rows = None if magnitude is None else magnitude.flatten()
    return Pair(A, B, float(A.shape[0]) if alpha is None else alpha, kind, magnitude=rows)


def _compressed(
    path: Path,
    dense: Mapping[str, tuple[tuple[str, ...], Mapping[str, Tensor]]],
    compression: CompressionTarget | None,
    base: BaseModel | None,
    say: Say,
    *,
    linear: bool,
) -> dict[str, Pair]:
    """Compresses dense changes, with their modules by key, to pairs of scale 1; `say` gets the error of each.

    `linear`: the UNet's projections around attention are no convolutions. DataError if the shape of a convolution's kernel is
    unknown.
    """
    names = sorted({lycoris.algorithm(slots) for _, slots in dense.values()})
    if compression is None or not compression.given:
        named = sorted(module for modules, _ in dense.values() for module in modules)
        raise ConfigError(
            f"{path} holds {' and '.join(names)}, which are not pairs, for {len(named)} modules: {', '.join(named[:3])}. "
            "They can be compressed to pairs: --rank 16, or --error 0.01 for the smallest ranks within that error; "
            "the error of each is printed."
        )
    problems = Problems(f"{path} cannot be compressed", DataError)
    pairs: dict[str, Pair] = {}
    flat_ones: list[str] = []
    for key, (modules, slots) in dense.items():
        change = lycoris.lycoris_delta(slots, _alpha(slots))
        parts = change if isinstance(change, str) else changes_of_module(key, modules, change)
        if isinstance(parts, str):
            problems.add(f"{path}: {modules[0] if len(modules) == 1 else key} {parts}.")
            continue
        for module, part in parts.items():
            shape = None if base is None else base.shape(module)
            if shape is None and part.dim() == 2 and lycoris.may_be_convolution(module, linear=linear):
                flat_ones.append(f"{module} {tuple(part.shape)}")
                continue
            pairs[module], error = fit_pair(lycoris.unflattened(part, shape), compression)
            say(f"{module}: {lycoris.algorithm(slots)} compressed to rank {pairs[module].rank}, relative error {error:.2g}")
    if flat_ones:
        problems.add(
            f"{path}: {len(flat_ones)} changes may be of convolutions, and are stored as matrices, from which the kernel's size "
            f"is unknown: {', '.join(flat_ones[:3])}. Name the folder of the model that they are for with --base."
        )
    problems.raise_if_any()
    return pairs


def _linear_projections(groups: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """True if proj_in and proj_out of the UNet are linear (SDXL, SD 2.x), False for convolutions (SD 1.x).

    SDXL and SD 2.x have other keys, a second text encoder, or text states of width 2048 or 1024; in SD 1.x it is 768.
    """
    if any(key.startswith("lora_te2_") or key in ldm_keys() for key in groups):
        return True
    for key, slots in groups.items():
        if key.endswith(("attn2_to_k", "attn2_to_v")):
            change = lycoris.lycoris_delta(slots, None) if lycoris.is_dense(slots) else slots[_DOWN]
            return not isinstance(change, str) and change.shape[-1] in _LINEAR_TEXTS
    return False


def _alpha_of(pair: Pair) -> float:
    """The alpha of the pair by the rule alpha/rank, rounded to fp32."""
    return float(torch.tensor(alpha_for(pair.scale, pair.rank)))


def write(adapter: Adapter, path: Path, *, base: BaseModel | None = None, say: Say = print) -> None:
    """Writes `adapter` to the file `path`, which appears whole or not at all; the same adapter gives the same bytes.

    `say` gets what diffusers does not read of it. ConfigError names what kohya's format cannot hold, and modules that the model
    (or `base`) lacks.
    """
    check_supported(adapter, "kohya", kinds=("linear", "conv2d"), dora=True)
    advice = "Name another image model's folder with --base; an adapter of a language model goes --to peft, gguf or mlx."
    problems = Problems("The adapter cannot be written as kohya", remedy=advice)
    transformer = any(in_transformer(module) for module in adapter.pairs)
    family: Family | TransformerFamily
    if transformer:
        config = {} if base is None else base.config("transformer")
        family = transformer_family(adapter.pairs, adapter.metadata, config)
        pairs = keyed(adapter.pairs, family, base, problems)
    else:
        family = diffusion_family(dict(adapter.pairs), adapter.metadata, None if base is None else base.config("unet"))
        pairs = _keyed(adapter, family, base, problems)
    problems.raise_if_any()
    alphas = Counter(_alpha_of(pair) for pair in pairs.values())
    alpha = min(alphas, key=lambda value: (value == 0, -alphas[value], value)) or 1.0  # the most frequent; never 0
    tensors: dict[str, Tensor] = {}
    for key, pair in pairs.items():
        own_alpha = _alpha_of(pair)
        written = (own_alpha if transformer else alpha) or 1.0
        tensors[f"{key}.{_DOWN}.weight"] = pair.A.float()
        tensors[f"{key}.{_UP}.weight"] = pair.B.float() if own_alpha == written else pair.B.float() * (own_alpha / written)
        tensors[f"{key}.alpha"] = torch.tensor(written)
        if pair.magnitude is not None:
            tensors[f"{key}.dora_scale"] = pair.magnitude.float().reshape(-1, *[1] * (pair.A.dim() - 1))
    known = {key: value for key, value in metadata_without_peft(adapter).items() if key != FAMILY_KEY}
    unet = {} if base is None else base.config("unet")
    metadata = _network_metadata(pairs if transformer else adapter.pairs, alpha, family=family, known=known, unet=unet)
    total = hashlib.sha256()  # of the tensors in the order of the file, as A1111 computes it
    for name in in_order({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}):
        total.update(bytes_of_tensor(tensors[name]))
    save_tensors(path, tensors, metadata={"format": "pt", **metadata, HASH: total.hexdigest()})
    if unread := unread_by_diffusers(pairs, family):
        say(unread)


def _keyed(adapter: Adapter, family: Family, base: BaseModel | None, problems: Problems) -> dict[str, Pair]:
    """The pairs of a UNet and its text encoders by kohya's keys; pairs without a key go to `problems`."""
    own = () if base is None else base.weights
    matrices = [path for path, (file, name) in base.weights.items() if len(file.tensors[name].shape) > 1] if base else []
    of_unet = {path.removeprefix("unet.") for path in matrices if path.startswith("unet.")}
    ldm = of_unet <= unet_modules("sdxl")  # otherwise LDM's names do not apply
    found: dict[str, Pair] = {}
    for module, pair in adapter.pairs.items():
        key = kohya_key(module, family, own, ldm=ldm)
        if key is None:
            hint = nearest(module, flat_keys(own).values())
            problems.add(f"{module} is no module of Stable Diffusion ({family}), so it has no key in kohya's format.{hint}")
        else:
            found[key] = pair
    return found


def _network_metadata(
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
    ranks = {pair.rank for pair in pairs.values()}
    spatial = {path for path, pair in pairs.items() if pair.kind == "conv2d" and pair.A.shape[2:].numel() > 1}
    of_spatial = {pairs[path].rank for path in spatial}
    dims = {pair.rank for path, pair in pairs.items() if path not in spatial} or ranks
    dora = any(pair.magnitude is not None for pair in pairs.values())
    arguments = {"algo": "lora", "dora_wd": "True"} if dora else {}
    if len(of_spatial) == 1:
        arguments |= {"conv_dim": str(*of_spatial), "conv_alpha": repr(alpha)}
    made = {
        "ss_network_module": "lycoris.kohya" if dora else _NETWORKS.get(family, "networks.lora"),
        "ss_network_dim": str(*dims) if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": repr(alpha),
        **({"ss_network_args": json.dumps(arguments)} if arguments else {}),
        **_version(pairs, family, unet),
    }
    true = {
        "ss_network_dim": {str(rank) for rank in ranks} | {made["ss_network_dim"]},
        "ss_network_alpha": {f"{alpha:g}", repr(alpha)},
    }
    kept = {key: text for key, text in known.items() if key not in true or text in true[key]}
    return {**made, **kept}


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

"""Kohya's (A1111's, ComfyUI's) LoRA files of Stable Diffusion 1.x, 2.x and SDXL; LyCORIS files share their keys.

    PREFIX_MODULE.lora_down.weight   (rank, in), for a convolution (rank, in, k, k)
    PREFIX_MODULE.lora_up.weight     (out, rank), for a convolution (out, rank, 1, 1)
    PREFIX_MODULE.alpha              a number; scale = alpha/rank of this module; without any, the scale is 1.
                                     Written with one value for all: diffusers 0.42 loads alphas of attention and text
                                     encoder wrongly where they differ, so what differs is multiplied into lora_up
    PREFIX_MODULE.dora_scale         (out, 1) or (out, 1, 1, 1)
    PREFIX_MODULE.lora_mid.weight    (rank, rank, k, k): a convolution in Tucker form, multiplied into lora_down when read

PREFIX is lora_unet, lora_te (SD 1.x), lora_te1 and lora_te2 (SDXL). MODULE is the path with underscores, for SDXL's UNet in
the names of Stability's own code. Metadata (ss_*, modelspec.*) is kept, but for hashes, and made where it is missing
(formats/kohya_metadata).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import Kind, alpha_for
from lorakeet.errors import ConfigError, DataError, Problems, nearest
from lorakeet.formats import lycoris
from lorakeet.formats.base_model import BaseModel
from lorakeet.formats.dense import Compression, compress
from lorakeet.formats.kohya_metadata import HASH, hash_of, network_metadata
from lorakeet.formats.limits import check_holds
from lorakeet.formats.safe import open_safetensors, save_tensors
from lorakeet.formats.sd_names import FAMILY_KEY, family_of, flat_keys, in_transformer, kohya_key, ldm_keys, unet_modules
from lorakeet.formats.tensors import factor_problem, read_tensors

Say = Callable[[str], None]
PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_DOWN, _UP, _MID = "lora_down", "lora_up", "lora_mid"
SLOTS = (_DOWN, _UP, _MID, "alpha", "dora_scale", *lycoris.LOHA, *lycoris.LOKR)
_HASHES = ("sshs_legacy_hash", "modelspec.hash_sha256")  # of a whole file; the one of the tensors is made anew
_PEFT_ONLY = ("task_type", "revision", "lora_dropout")


def read(path: Path, *, base: BaseModel | None = None, compression: Compression | None = None, say: Say = print) -> Adapter:
    """The adapter in the file `path`, its paths with their component. LoHa and LoKr need `compression`; `say` gets its errors.

    DataError lists everything that cannot be understood; nothing is dropped.
    """
    file = open_safetensors(path)
    problems = Problems(f"The adapter in {path} cannot be read", DataError)
    groups = _groups(read_tensors(file, problems), path, problems)
    _check_alphas(groups, path, problems)
    known = flat_keys(() if base is None else base.weights)
    pairs: dict[str, Pair] = {}
    dense: dict[str, Mapping[str, Tensor]] = {}
    for key, slots in groups.items():
        module = known.get(key)
        if module is None:
            hint = "" if base else " If the base has other modules than SD 1.x and SDXL, name its folder with --base."
            problems.add(f"{path}: {key} is no module of Stable Diffusion 1.x or SDXL.{nearest(key, known)}{hint}")
        elif module in pairs or module in dense:
            problems.add(f"{path}: {key} is a second spelling of {module}, which has its tensors already.")
        elif lycoris.is_dense(slots):
            if extra := lycoris.not_understood(slots):
                problems.add(_extra_message(path, key, slots, extra))
            dense[module] = slots
        elif isinstance(pair := _pair(module, slots), str):
            problems.add(f"{path}: {pair}")
        else:
            pairs[module] = pair
    problems.raise_if_any()
    if dense:
        pairs |= _compressed(path, dense, compression, say)
    metadata = {key: value for key, value in file.metadata.items() if key not in (HASH, *_HASHES, "format")}
    if family := _spelled(groups, [*pairs, *dense]):
        metadata[FAMILY_KEY] = family
    if not any("alpha" in slots for slots in groups.values()):
        say(f"{path} has no alpha for any module; by kohya's rule every scale is 1.")
    if dropped := sorted(set(file.metadata) & set(_HASHES)):
        say(f"Left out {', '.join(dropped)}: hashes of a file that is written anew.")
    return Adapter(dict(sorted(pairs.items())), base=metadata.get("ss_sd_model_name", ""), metadata=metadata)


def _extra_message(path: Path, key: str, slots: Mapping[str, Tensor], extra: Iterable[str]) -> str:
    algorithm = lycoris.algorithm(slots)
    found = ", ".join(f"{slot} {tuple(slots[slot].shape)}" for slot in extra)
    return (
        f"{path}: {key} is {algorithm}, but has tensors that are not understood beside it: {found}. They would be lost; expected "
        f"the tensors of one {algorithm} and alpha alone. Train the adapter again without them, or bake it into its base."
    )


def _spelled(groups: Iterable[str], pairs: Iterable[str]) -> str:
    """The family that the spelling of the keys gives away, or an empty string.

    lora_te1 alone says little: diffusers writes it for SD 1.x too, whose UNet has modules that SDXL's has not.
    """
    keys = list(groups)
    if any(key.startswith("lora_te_") for key in keys):
        return "sd1"
    if any(key.startswith("lora_te2_") or key in ldm_keys() for key in keys):
        return "sdxl"
    unet = {path.partition(".")[2] for path in pairs if path.startswith("unet.")}
    return "sdxl" if any(key.startswith("lora_te1_") for key in keys) and unet <= unet_modules("sdxl") else ""


def _groups(tensors: Mapping[str, Tensor], path: Path, problems: Problems) -> dict[str, dict[str, Tensor]]:
    """The tensors by module key and slot."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, slot = name.partition(".")
        short = slot.removesuffix(".weight")
        if key.startswith(PREFIXES) and short in groups.get(key, {}):
            problems.add(f"{path}: {key} has {short} twice, with and without .weight; expected one. Fetch the file again.")
        elif key.startswith(PREFIXES) and short in SLOTS:
            groups.setdefault(key, {})[short] = tensor
        else:
            hint = nearest(slot, SLOTS)
            problems.add(f"{path}: {name} {tuple(tensor.shape)} is a kind of tensor that is not known here.{hint}")
    return groups


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


def _alpha(slots: Mapping[str, Tensor]) -> float | None:
    return float(slots["alpha"]) if "alpha" in slots and slots["alpha"].numel() == 1 else None


def _pair(module: str, slots: Mapping[str, Tensor]) -> Pair | str:
    missing = [slot for slot in (_DOWN, _UP) if slot not in slots]
    if missing:
        return f"{module} has {', '.join(sorted(slots))} but no {' and no '.join(missing)}."
    A, B = slots[_DOWN], slots[_UP]
    if (core := slots.get(_MID)) is not None:
        if core.dim() != 4 or A.flatten(1).shape[0] != core.shape[1]:
            return f"{module} has lora_mid {tuple(core.shape)} and lora_down {tuple(A.shape)}, which do not go together."
        A = torch.einsum("rpkl,pi->rikl", core, A.flatten(1)).contiguous()
    if wrong := factor_problem(module, A, B):
        return wrong
    kind: Kind = "conv2d" if A.dim() == 4 else "linear"
    alpha, magnitude = _alpha(slots), slots.get("dora_scale")
    if magnitude is not None and (magnitude.shape[0] != B.shape[0] or magnitude.numel() != B.shape[0]):
        return f"{module} has dora_scale {tuple(magnitude.shape)}; only one length for each of the {B.shape[0]} rows can be read."
    rows = None if magnitude is None else magnitude.flatten()
    return Pair(A, B, float(A.shape[0]) if alpha is None else alpha, kind, magnitude=rows)


def _compressed(
    path: Path, dense: Mapping[str, Mapping[str, Tensor]], compression: Compression | None, say: Say
) -> dict[str, Pair]:
    """Dense changes as pairs of scale 1; `say` hears the error of each."""
    names = sorted({lycoris.algorithm(slots) for slots in dense.values()})
    if compression is None or not compression.asked:
        raise ConfigError(
            f"{path} holds {' and '.join(names)}, which are not pairs, for {len(dense)} modules: {', '.join(sorted(dense)[:3])}. "
            "They can be compressed to pairs: --rank 16, or --error 0.01 for the smallest ranks within that error; "
            "the error of each is printed."
        )
    problems = Problems(f"{path} cannot be compressed", DataError)
    pairs: dict[str, Pair] = {}
    for module, slots in dense.items():
        change = lycoris.delta(slots, _alpha(slots))
        if isinstance(change, str):
            problems.add(f"{path}: {module} {change}.")
            continue
        pairs[module], error = compress(change, compression)
        say(f"{module}: {lycoris.algorithm(slots)} compressed to rank {pairs[module].rank}, relative error {error:.2g}")
    problems.raise_if_any()
    return pairs


def _alpha_of(pair: Pair) -> float:
    """The alpha of the pair by the rule alpha/rank, as fp32 holds it."""
    return float(torch.tensor(alpha_for(pair.scale, pair.rank)))


def write(adapter: Adapter, path: Path, *, base: BaseModel | None = None) -> None:
    """Writes `adapter` to the file `path`, which appears whole or not at all; the same adapter gives the same bytes.

    ConfigError names what kohya's format has no place for, and modules that Stable Diffusion (or `base`) does not have.
    """
    check_holds(adapter, "kohya", kinds=("linear", "conv2d"), dora=True)
    transformer = [module for module in adapter.pairs if in_transformer(module)]
    if transformer:
        raise ConfigError(
            f"{len(transformer)} pairs are on a diffusion transformer ({transformer[0]}, …), whose keys in kohya's format "
            "are another model's: it joins queries, keys and values. Write it --to diffusers, which diffusers and ComfyUI load."
        )
    own = () if base is None else base.weights
    family = family_of(dict(adapter.pairs), adapter.metadata, None if base is None else base.config("unet"))
    ldm = base is None or _has_sdxl_blocks(base)
    advice = "Name another image model's folder with --base; an adapter of a language model goes --to peft, gguf or mlx."
    problems = Problems("The adapter cannot be written as kohya", remedy=advice)
    tensors: dict[str, Tensor] = {}
    alphas = Counter(_alpha_of(pair) for pair in adapter.pairs.values())
    alpha = min(alphas, key=lambda value: (value == 0, -alphas[value], value))  # the most frequent; 0 only where all are 0
    for module, pair in adapter.pairs.items():
        key = kohya_key(module, family, own, ldm=ldm)
        if key is None:
            hint = nearest(module, flat_keys(own).values())
            problems.add(f"{module} is no module of Stable Diffusion ({family}), so it has no key in kohya's format.{hint}")
            continue
        own_alpha = _alpha_of(pair)
        tensors[f"{key}.{_DOWN}.weight"] = pair.A.float()
        tensors[f"{key}.{_UP}.weight"] = pair.B.float() if own_alpha == alpha else pair.B.float() * (own_alpha / alpha)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        if pair.magnitude is not None:
            tensors[f"{key}.dora_scale"] = pair.magnitude.float().reshape(-1, *[1] * (pair.A.dim() - 1))
    problems.raise_if_any()
    known = {key: value for key, value in adapter.metadata.items() if key not in (*_PEFT_ONLY, FAMILY_KEY)}
    unet = {} if base is None else base.config("unet")
    metadata = network_metadata(adapter.pairs, alpha, family=family, known=known, unet=unet)
    save_tensors(path, tensors, metadata={"format": "pt", **metadata, HASH: hash_of(tensors)})


def _has_sdxl_blocks(base: BaseModel) -> bool:
    """Whether every linear layer and convolution of the base's UNet is one of SDXL's, so that LDM's names mean the same."""
    found = {path for path, (file, name) in base.weights.items() if len(file.tensors[name].shape) > 1}
    return {path.removeprefix("unet.") for path in found if path.startswith("unet.")} <= unet_modules("sdxl")

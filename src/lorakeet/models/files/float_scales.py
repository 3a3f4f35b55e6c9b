"""Model folders whose weights are small numbers with scales: FP8 of transformers, compressed-tensors, MXFP4.

    quant_method         tensors                                            read as
    fp8                  x.weight (float8), x.weight_scale_inv              Fp8Base; one scale, or one for each block
    compressed-tensors   x.weight (float8 or int8), x.weight_scale          Fp8Base or Int8Base; one scale, one a row, or blocks
    compressed-tensors   x.weight_packed (int4, int8), x.weight_scale, …    PackQuantizedBase (quant/pack_quantized)
    mxfp4                x_blocks, x_scales (experts of gpt-oss)            a stack of Mxfp4Base (quant/stack)

A model keeps stacks of experts packed (models/files/quantized.with_packed_stacks), also those that are joined out of matrices of
single experts (models/files/joined_experts); elsewhere both are dequantised as they are read. The scales of activations that such
folders may have are not used: activations are not quantised here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.quant import pack_quantized
from lorakeet.quant.fp8 import Block, Fp8Base, scale_shape
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.mxfp4 import Mxfp4Base, unpack_mxfp4, unpacked_shape
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.stack import PackedStack

FP8, COMPRESSED, MXFP4 = "fp8", "compressed-tensors", "mxfp4"
SCALE = {FP8: "_scale_inv", COMPRESSED: "_scale"}  # after the name of the weight
_UNUSED = (
    ".activation_scale", ".input_scale", ".input_zero_point", ".output_scale",
    ".k_scale", ".v_scale", ".q_scale", ".prob_output_scale",  # of a cache in FP8
)  # fmt: skip
PACKED = "pack-quantized"
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", PACKED)
_USUAL = (128, 128)
_REMEDY = "Fetch the model again, or name the unquantised one."
Read = Callable[[SafeFile, str], Tensor]


@dataclass(frozen=True)
class Dequantised:
    """A tensor that is dequantised when it is called for; its shape is known before.

    A stack of matrices can also be had packed: `packed` reads it, of (count, out, in) whatever the tensor's shape.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    packed: Callable[[], PackedStack] | None = None

    def __call__(self) -> Tensor:
        return self.make()


def require_known(stored: Mapping[str, Any], where: object) -> None:
    """ConfigError for a kind of compressed-tensors that is not read, with its name."""
    if stored.get("quant_method") != COMPRESSED:
        return
    odd = [key for key in ("transform_config", "sparsity_config") if stored.get(key)]
    groups = list(dict(stored.get("config_groups") or {}).values())
    whole = [group for group in groups if _format(group, stored) != PACKED]
    odd += ["symmetric: false"] if any((group.get("weights") or {}).get("symmetric") is False for group in whole) else []
    if odd:
        raise ConfigError(
            f"{where} is in compressed-tensors with {', '.join(odd)}, which is not read: its numbers would be others. Name the "
            "unquantised model."
        )
    strange = sorted({_format(group, stored) for group in groups} - set(FORMATS))
    if strange:
        raise ConfigError(
            f"{where} has weights in compressed-tensors' format {', '.join(strange)}; {', '.join(FORMATS)} are read. Name the "
            "unquantised model."
        )


def _format(group: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    return str(group.get("format") or stored.get("format"))


def words_in_files(files: Mapping[str, SafeFile], stored: Mapping[str, Any], read: Read) -> dict[str, Callable[[], PackedBase]]:
    """The lazy matrices of a folder that are packed in words, by the names of the weights, such as "….q_proj.weight".

    DataError lists every part that is missing.
    """
    names = [name.removesuffix(pack_quantized.MARK) for name in files if name.endswith(f".weight{pack_quantized.MARK}")]
    problems = Problems("The model's packed weights are not whole", DataError, remedy=_REMEDY)
    for name in names:
        lost = [part for part in pack_quantized.PARTS if part not in pack_quantized.OPTIONAL and name + part not in files]
        if lost:
            problems.add(f"{files[name + pack_quantized.MARK].path}: {', '.join(f'{name}{part}' for part in lost)} is missing.")
        if f"{name}_zero_point" not in files and _asymmetric(stored, name.removesuffix(".weight")):
            where = f"{files[name + pack_quantized.MARK].path}: {name}_zero_point"
            problems.add(f"{where} is missing, and the settings of its group say symmetric: false.")
    problems.raise_if_any()

    def made(name: str) -> Callable[[], PackedBase]:
        def make() -> PackedBase:
            parts = {part: read(files[name + part], name + part) for part in pack_quantized.PARTS if name + part in files}
            try:
                return pack_quantized.base_from_words(parts, _numbers(stored, "group_size"), _numbers(stored, "num_bits"))
            except ValueError as error:
                raise DataError(f"{files[name + pack_quantized.MARK].path}: '{name}': {error}. {_REMEDY}") from error

        return make

    return {name: made(name) for name in names}


def _asymmetric(stored: Mapping[str, Any], path: str) -> bool:
    """True if the group of the layer at `path` has zero points: one that names it, else by a pattern ("re:…"), else by class."""
    groups = list(dict(stored.get("config_groups") or {}).values())
    ranks = [max((_targeted(str(target), path) for target in group.get("targets") or ("Linear",)), default=0) for group in groups]
    found = [group.get("weights") or {} for group, rank in zip(groups, ranks, strict=True) if rank == max(ranks)]
    return bool(found) and all(weights.get("symmetric") is False for weights in found)


def _targeted(target: str, path: str) -> int:
    """How closely a group's target names a layer: 3 by path, 2 by pattern, 1 perhaps by its class, 0 not."""
    if target.startswith("re:"):
        try:
            return 2 if re.match(target.removeprefix("re:"), path) else 0
        except re.error as error:
            raise ConfigError(
                f"config.json has the target '{target}' in quantization_config, which is no pattern ({error}). {_REMEDY}"
            ) from error
    return 3 if target == path else 0 if "." in target else 1


def dense_name(name: str) -> str:
    """The name of the weight of which a stored tensor is the first part."""
    return name.removesuffix(pack_quantized.MARK) if name.endswith(f".weight{pack_quantized.MARK}") else name


def _numbers(stored: Mapping[str, Any], key: str) -> tuple[int, ...]:
    return tuple(int(group[key]) for group in _weight_settings(stored) if group.get(key))


def scaled_tensors(
    files: Mapping[str, SafeFile], stored: Mapping[str, Any], read: Read
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Callable[[], PackedBase]]]:
    """The lazy dense tensors and packed matrices of a folder in FP8 or int8 with scales, by the names of the weights.

    DataError lists every scale whose shape does not fit its weight.
    """
    mark, words = SCALE[str(stored["quant_method"])], words_in_files(files, stored, read)
    taken = {name + part for name in words for part in pack_quantized.PARTS}
    problems = Problems("The model's packed weights are not whole", DataError, remedy=_REMEDY)
    dense: dict[str, Callable[[], Tensor]] = {}
    packed: dict[str, Callable[[], PackedBase]] = dict(words)
    for name, file in files.items():
        scale, header = name + mark, file.tensors[name]
        if name in taken or name.endswith(_UNUSED) or (name.endswith(mark) and name.removesuffix(mark) in files):
            continue
        if header.dtype not in (torch.float8_e4m3fn, torch.int8) or len(header.shape) < 2:
            if scale in files or (header.dtype.itemsize == 1 and header.dtype.is_floating_point):
                problems.add(f"{file.path}: '{name}' is {header.dtype} {header.shape}; float8_e4m3fn and int8 matrices are read.")
            dense[name] = _plain(read, file, name)
        elif scale not in files:
            problems.add(f"{file.path}: '{scale}' is missing.")
        elif block := scaled_block(header.shape[-2:], files[scale].tensors[scale].shape, stored):
            make = _base_reader(read, (file, name), (files[scale], scale), block)
            if len(header.shape) == 2:
                packed[name] = partial(make, None)
            else:
                dense[name] = Dequantised(header.shape, *_stack_readers(make, header.shape[0]))
        else:
            given = files[scale].tensors[scale].shape
            problems.add(f"{files[scale].path}: '{scale}' is {given} for a weight of {header.shape}.")
    problems.raise_if_any()
    return dense, packed


def scaled_block(shape: tuple[int, ...], scales: tuple[int, ...], stored: Mapping[str, Any]) -> Block | None:
    """The rows and columns that share a scale, from the shape of the scales; None if they fit no way of sharing."""
    rows, columns = shape
    if len(scales) == 0 or set(scales[-2:]) == {1}:
        return rows, columns
    if tuple(scales[-2:]) in ((rows, 1), (rows,)):
        return 1, columns
    given = stored.get("weight_block_size") or _group_setting(stored, "block_structure") or _USUAL
    given = given.split("x") if isinstance(given, str) else given  # as older versions wrote it, "128x128"
    block = int(given[0]), int(given[1])
    return block if tuple(scales[-2:]) == scale_shape((rows, columns), block) else None


def scaled_settings(
    files: Mapping[str, SafeFile], name: str, shape: tuple[int, ...], stored: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of quant/construct.empty_base of the layer whose weight has this name; as config.json says without files."""
    mark, words = SCALE[str(stored["quant_method"])], name + pack_quantized.MARK
    if words in files:
        bits = pack_quantized.bits_of(shape[1], files[words].tensors[words].shape[-1], _numbers(stored, "num_bits")) or 4
        scales = files[name + mark].tensors[name + mark].shape
        groups = scales[1] if len(scales) > 1 else 1
        size = pack_quantized.group_size_of(shape[1], groups, _numbers(stored, "group_size")) or shape[1]
        return {"method": PACKED, "bits": bits, "groups": groups, "size": 0 if f"{name}_g_idx" in files else size}
    if name not in files:
        strategy = _group_setting(stored, "strategy")
        if str(stored.get("format")) == PACKED:
            size = next(iter(_numbers(stored, "group_size")), 0)
            size = size if size > 0 else shape[1]
            bits = int(_group_setting(stored, "num_bits") or 4)
            return {"method": PACKED, "bits": bits, "groups": -(-shape[1] // size), "size": size}
        block = (1, shape[1]) if strategy == "channel" else shape
        return {"method": "fp8", "block": list(stored.get("weight_block_size") or block)}
    if files[name].tensors[name].dtype == torch.int8:
        return {"method": "int8"}
    block = scaled_block(shape, files[name + mark].tensors[name + mark].shape, stored) or _USUAL
    return {"method": "fp8", "block": list(block)}


def mxfp4_tensors(files: Mapping[str, SafeFile], read: Read) -> dict[str, Callable[[], Tensor]]:
    """The lazy tensors of a folder with experts in MXFP4: those are unpacked, and turned as the model has them, (n, in, out)."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, file in files.items():
        base = name.removesuffix("_blocks")
        if base == name and not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in files):
            found[name] = _plain(read, file, name)
        elif base != name:
            if f"{base}_scales" not in files:
                raise DataError(f"{file.path}: '{base}_scales' is missing. {_REMEDY}")
            *stack, out, width = unpacked_shape(file.tensors[name].shape)
            found[base] = Dequantised((*stack, width, out), *_mxfp4_readers(read, files, base))
    return found


def _weight_settings(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [group.get("weights") or {} for group in dict(stored.get("config_groups") or {}).values()]


def _group_setting(stored: Mapping[str, Any], key: str) -> Any:
    return next((group[key] for group in _weight_settings(stored) if group.get(key)), None)


def _plain(read: Read, file: SafeFile, name: str) -> Callable[[], Tensor]:
    return lambda: read(file, name)


def _base_reader(
    read: Read, weight: tuple[SafeFile, str], scales: tuple[SafeFile, str], block: Block
) -> Callable[[int | None], PackedBase]:
    """Reads the matrix, or one of a stack."""

    def make(number: int | None) -> PackedBase:
        packed, scale = read(*weight), read(*scales).float()
        if number is not None:
            packed, scale = packed[number], scale if scale.dim() < 3 else scale[number]
        shape = (packed.shape[0], packed.shape[1])
        base: PackedBase
        if packed.dtype == torch.int8:
            if block[0] != 1 and block[0] != shape[0]:
                where = f"{weight[0].path}: '{weight[1]}'"
                raise DataError(f"{where} is int8 in blocks of {block}; one scale a row is read. {_REMEDY}")
            base = Int8Base(shape)
            base.packed.copy_(packed)
            base.scale.copy_(scale.reshape(-1).expand(shape[0]))
            return base
        base = Fp8Base(shape, block)
        base.packed.copy_(packed.view(torch.uint8))
        base.scale.copy_(scale.reshape(base.scale.shape))
        return base

    return make


def stack_settings(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By the names of stacks of matrices that can be had packed, the arguments of quant/construct.empty_stack."""
    if stored.get("quant_method") == MXFP4:
        names = [name.removesuffix("_blocks") for name in files if name.endswith("_blocks")]
        shapes = {name: unpacked_shape(files[f"{name}_blocks"].tensors[f"{name}_blocks"].shape) for name in names}
        return {name: {"method": MXFP4, "shape": shape} for name, shape in shapes.items() if len(shape) == 3}
    mark = SCALE[str(stored["quant_method"])]
    found: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        header = file.tensors[name]
        if name + mark in files and len(header.shape) == 3 and header.dtype in (torch.float8_e4m3fn, torch.int8):
            scales = files[name + mark].tensors[name + mark].shape
            block = scaled_block(header.shape[1:], scales, stored) or _USUAL
            own = {"method": "int8"} if header.dtype == torch.int8 else {"method": FP8, "block": list(block)}
            found[name] = {**own, "shape": header.shape}
    return found


def _stack_readers(
    make: Callable[[int | None], PackedBase], count: int
) -> tuple[Callable[[], Tensor], Callable[[], PackedStack]]:
    return (
        lambda: torch.stack([make(number).dense() for number in range(count)]),
        lambda: PackedStack.of(make(number) for number in range(count)),
    )


def _mxfp4_readers(
    read: Read, files: Mapping[str, SafeFile], base: str
) -> tuple[Callable[[], Tensor], Callable[[], PackedStack] | None]:
    blocks, scales = f"{base}_blocks", f"{base}_scales"

    def dense() -> Tensor:
        return unpack_mxfp4(read(files[blocks], blocks), read(files[scales], scales)).transpose(-1, -2).contiguous()

    def packed() -> PackedStack:
        codes = read(files[blocks], blocks).flatten(-2)  # (count, out, in / 2)
        found = PackedStack(Mxfp4Base((codes.shape[1], 2 * codes.shape[2])), len(codes))
        found.packed, found.scale = codes, read(files[scales], scales)
        return found

    return dense, packed if len(files[blocks].tensors[blocks].shape) == 4 else None

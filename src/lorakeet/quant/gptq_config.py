"""The GPTQ settings in config.json, and frozen bases from a checkpoint's tensors; every tensor that does not fit is named.

    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true,
                            "checkpoint_format": "gptq", …}           older folders keep it in quantize_config.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError, DataError, Problems, nearest
from lorakeet.kernels.gptq_words import WORD
from lorakeet.quant.gptq import BITS, PARTS, GptqBase, gptq_buffer_shapes, groups_in_order
from lorakeet.quant.gptq_solve import GptqLayout

METHOD = "gptq"
OLD_CONFIG = "quantize_config.json"
FORMATS = ("gptq", "gptq_v2")
# Settings on how the file was made or may be read; they change no number.
_NOTES = {
    "quant_method", "method", "meta", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "lm_head",
    "model_name_or_path", "model_file_base_name", "dataset", "tokenizer", "batch_size", "backend", "use_exllama",
    "exllama_config", "disable_exllama", "use_cuda_fp16", "max_input_length", "cache_block_outputs", "model_seqlen",
    "module_name_preceding_first_block", "block_name_to_quantize", "modules_in_block_to_quantize", "pad_token_id", "mse",
    "act_group_aware", "parallel_packing", "device", "offload_to_disk", "quantizer", "_scale_dtype", "quant_type", "v2",
    "v2_alpha", "gptaq", "foem", "hyb_act", "rotation", "is_marlin_format",
}  # fmt: skip
_ALSO: dict[str, tuple[torch.dtype, ...]] = {
    "qweight": (), "qzeros": (), "scales": (torch.float32, torch.bfloat16), "g_idx": (torch.int64,)
}  # fmt: skip
_OVERRIDES = {"bits", "group_size", "sym", "desc_act"}


@dataclass(frozen=True)
class GptqConfig(GptqLayout):
    """How the layers of a checkpoint are packed. `dynamic`: by pattern of the path, other settings, or None for a dense layer."""

    dynamic: tuple[tuple[str, Mapping[str, Any] | None], ...] = field(default=())

    def for_layer(self, path: str) -> GptqConfig | None:
        """The settings of the layer at `path`, or None if it is dense. The first matching pattern decides."""
        for pattern, overrides in self.dynamic:
            if re.match(pattern, path):
                return None if overrides is None else replace(self, **overrides)
        return self

    def groups(self, columns: int) -> int:
        """The number of groups in a row of `columns` numbers; the last one may be smaller."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)


def parse(stored: Mapping[str, Any], where: str) -> GptqConfig:
    """Parses a quantization_config. ConfigError lists all that is missing, unknown or not supported."""
    remedy = "Fetch the model again, or make one with lorakeet quantize --method gptq."
    problems = Problems(f"The GPTQ settings of {where} cannot be used", ConfigError, remedy=remedy)
    zero_format = str(stored.get("checkpoint_format", stored.get("format", "gptq")) or "gptq").lower()
    if stored.get("is_marlin_format"):
        zero_format = "marlin"
    if zero_format not in FORMATS:
        problems.add(
            f"{where}: checkpoint_format is '{zero_format}'; readable are {' and '.join(FORMATS)}."
            f"{nearest(zero_format, FORMATS)} Save the model in one of them."
        )
    if stored.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        problems.add(f"{where}: pack_dtype is {stored['pack_dtype']!r}; only int32 is readable.")
    values = _sizes(stored, where, problems, required=True)
    dynamic: list[tuple[str, Mapping[str, Any] | None]] = []
    for pattern, overrides in (stored.get("dynamic") or {}).items():
        dynamic.append(_dynamic(pattern, overrides, where, problems))
    known = {*_NOTES, *_OVERRIDES, "checkpoint_format", "format", "pack_dtype", "dynamic"}
    for name, value in stored.items():
        if name not in known and value:
            problems.add(f"{where}: '{name}' is {value!r}, a setting that is not known here.{nearest(name, sorted(known))}")
    problems.raise_if_any()
    return GptqConfig(**values, zero_format=zero_format, dynamic=tuple(dynamic))  # type: ignore[arg-type]


def gptq_mapping(config: GptqLayout, *, damping: float, version: str) -> dict[str, Any]:
    """The quantization_config of a folder written here, as transformers with gptqmodel reads it."""
    return {
        "quant_method": METHOD,
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        "checkpoint_format": config.zero_format,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {
            "quantizer": [f"lorakeet:{version}"],
            "damp_percent": damping,
            "static_groups": not config.desc_act,
            "true_sequential": True,
        },
    }


def layer_problems(name: str, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], config: GptqConfig) -> list[str]:
    """Every problem with the dtypes and shapes of the tensors of the layer `name`, which are keyed as in PARTS.

    g_idx may be missing without desc_act; scales may be fp32 or bf16.
    """
    missing = [part for part in PARTS if part not in stored and (part != "g_idx" or config.desc_act)]
    why = {"g_idx": ", and desc_act is true, so the groups of the columns are not known"}
    if missing:
        return [f"'{name}.{part}' is missing{why.get(part, '')}." for part in missing]
    shape = _shape(stored, config.bits)
    try:
        expected = gptq_buffer_shapes(shape, bits=config.bits, groups=config.groups(shape[1]))
    except ValueError as error:
        return [f"'{name}.scales' {stored['scales'][1]} and '{name}.qweight' {stored['qweight'][1]} do not fit: {error}."]
    needs = f"{config.bits} bits in groups of {config.group_size} need"
    return [
        f"'{name}.{part}' is {_named(dtype)} {size}, but {needs} {_named(expected[part][0])} {expected[part][1]}."
        for part, (dtype, size) in stored.items()
        if size != expected[part][1] or not (dtype == expected[part][0] or dtype in _ALSO[part])
    ]


def base_from(name: str, parts: Mapping[str, Tensor], config: GptqConfig) -> GptqBase:
    """The base of the tensors of the layer `name`, after `layer_problems` found none.

    DataError if a group does not exist, or a scale is not finite.
    """
    shape = _shape({part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}, config.bits)
    groups = config.groups(shape[1])
    g_idx = parts["g_idx"] if "g_idx" in parts else groups_in_order(shape[1], config.group_size)
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise DataError(f"'{name}.g_idx' names groups {int(g_idx.min())} to {int(g_idx.max())}; there are {groups}, from 0.")
    scales = parts["scales"].to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise DataError(f"'{name}.scales' has values that are not finite in float16.")
    base = GptqBase(shape, bits=config.bits, groups=groups, sym=config.sym, zero_format=config.zero_format)
    for part, tensor in (("qweight", parts["qweight"]), ("qzeros", parts["qzeros"]), ("scales", scales), ("g_idx", g_idx)):
        base.get_buffer(part).copy_(tensor)
    return base


def _shape(stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], bits: int) -> tuple[int, int]:
    """(out, in), with the input columns of g_idx, else of qweight."""
    rows = stored["scales"][1][-1] if stored["scales"][1] else 0
    words = stored["qweight"][1][0] if stored["qweight"][1] else 0
    return rows, stored["g_idx"][1][0] if "g_idx" in stored and len(stored["g_idx"][1]) == 1 else words * WORD // bits


def _sizes(stored: Mapping[str, Any], where: str, problems: Problems, *, required: bool) -> dict[str, Any]:
    """Checks bits, group_size, sym and desc_act."""
    values: dict[str, Any] = {}
    for key, fits, expected in (
        ("bits", lambda bits: bits in BITS, f"one of {', '.join(map(str, BITS))}"),
        ("group_size", lambda size: size == -1 or size > 0, "a number of columns such as 128, or -1 for the whole row"),
    ):
        value = stored.get(key)
        if value is None and not required:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not fits(value):
            problems.add(f"{where}: {key} is {value!r}; expected {expected}.")
        values[key] = value
    for key in ("sym", "desc_act"):
        value = stored.get(key)
        if value is not None and not isinstance(value, bool):
            problems.add(f"{where}: {key} is {value!r}; expected true or false.")
        elif value is not None:
            values[key] = value
    return values


def _dynamic(
    pattern: str, overrides: Any, where: str, problems: Problems
) -> tuple[str, Mapping[str, Any] | None]:
    """One line of gptqmodel's `dynamic`: "-:PATTERN" keeps layers dense, "+:PATTERN" or PATTERN gives them other settings."""
    bare = pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
    try:
        re.compile(bare)
    except re.error as error:
        problems.add(f"{where}: the pattern {bare!r} of 'dynamic' cannot be read: {error}.")
    if pattern.startswith("-:") or not isinstance(overrides, Mapping):
        return bare, None if pattern.startswith("-:") else {}
    for name in overrides:
        if name not in _OVERRIDES | _NOTES:
            problems.add(f"{where}: 'dynamic' changes '{name}' for {bare!r}; known are {', '.join(sorted(_OVERRIDES))}.")
    return bare, _sizes(overrides, f"{where}, dynamic {bare!r}", problems, required=False)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

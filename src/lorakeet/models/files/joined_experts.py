"""Experts whose packed matrices lie in the files one by one: transformers joins them, and their stack can stay packed.

FP8, int8, and the words of compressed-tensors (int4), whose names end in "weight_packed":

    x.experts.3.gate_proj.weight   codes (w, in), scales (w / 128, in / 128)  ┐ rows one below the other: the matrix of expert 3
    x.experts.3.up_proj.weight     codes (w, in), scales (w / 128, in / 128)  ┘ of x.experts.gate_up_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorakeet.core.layers.experts import stack_shape, stored_transposed
from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models.files import float_scales
from lorakeet.models.files.checkpoint_pieces import Piece, pieces_of
from lorakeet.quant import pack_quantized
from lorakeet.quant.construct import empty_base
from lorakeet.quant.packed import PackedBase


@dataclass(frozen=True)
class JoinedStack:
    """A stack of experts: the arguments of quant/construct.empty_stack, and the names of each expert's parts, in row order."""

    settings: Mapping[str, Any]
    parts: tuple[tuple[str, ...], ...]


def joined_stacks(
    model: Any, stacks: Mapping[str, Any], files: Mapping[str, SafeFile], stored: Mapping[str, Any]
) -> dict[str, JoinedStack]:
    """By its path, each of the model's `stacks` (blocks by the path of a parameter) that can be joined out of packed matrices.

    They are in FP8 or int8 with scales, or in words with groups of columns in order; left out are those whose parts share scales
    in ways that do not go together.
    """
    if stored.get("quant_method") not in float_scales.SCALE:
        return {}
    pieces = pieces_of(model, {float_scales.dense_name(name): file.tensors[name].shape for name, file in files.items()})
    found = {}
    for path, module in stacks.items():
        own = pieces.get(path, ())
        alone = bool(own) and all(piece.expert is not None and piece.rows is None and not piece.across for piece in own)
        if not alone or stored_transposed(module):
            continue
        shape = stack_shape(module, path.rpartition(".")[2])
        parts, settings = _by_expert(own), [_settings(files, piece.name, stored, shape[2]) for piece in own]
        if len(parts) == shape[0] and (how := _common(settings)) is not None:
            found[path] = JoinedStack({**how, "shape": shape}, parts)
    return found


def rows_joined(bases: list[PackedBase], settings: Mapping[str, Any]) -> PackedBase:
    """The matrix whose rows are those of `bases`, one below the other, as `settings` of its stack say it is packed.

    DataError for a matrix of other columns than the model's.
    """
    found = empty_base({**settings, "shape": settings["shape"][1:]})
    if odd := [base.shape for base in bases if base.shape[1] != found.shape[1]]:
        size, wanted = "×".join(map(str, odd[0])), found.shape[1]
        raise DataError(f"A matrix of an expert is {size}; expected {wanted} columns by config.json. Fetch the model again.")
    for name, buffer in found.named_buffers():
        parts = [getattr(base, name) for base in bases]
        if sum(map(len, parts)) == len(buffer):
            torch.cat(parts, out=buffer)
        elif not all(torch.equal(part, buffer) for part in parts):  # of columns: the same for all
            raise ValueError(f"the {name} of matrices whose rows are joined differ")
    return found


def _by_expert(pieces: tuple[Piece, ...]) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for piece in pieces:
        names.setdefault(int(piece.expert or 0), []).append(piece.name)
    return tuple(tuple(names[number]) for number in sorted(names))


def _settings(files: Mapping[str, SafeFile], name: str, stored: Mapping[str, Any], columns: int) -> dict[str, Any] | None:
    """How the matrix of this name, of so many columns, is packed; None where it is not, or in columns that are not in order."""
    words = name + pack_quantized.MARK
    if words in files:
        shape = (files[words].tensors[words].shape[0], columns)
        own = float_scales.scaled_settings(files, name, shape, stored)
        return {**own, "shape": shape} if own["size"] else None
    header = files[name].tensors[name]
    if header.dtype not in (torch.float8_e4m3fn, torch.int8) or len(header.shape) != 2:
        return None
    shape = (header.shape[0], header.shape[1])
    return {**float_scales.scaled_settings(files, name, shape, stored), "shape": shape}


def _common(settings: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The packing that all parts have, if their rows can lie one below the other: in whole blocks."""
    known = [one for one in settings if one is not None]
    ways = [{name: value for name, value in one.items() if name != "shape"} for one in known]
    if len(known) < len(settings) or any(way != ways[0] for way in ways):
        return None
    block = ways[0].get("block")
    if block and any(one["shape"][0] % block[0] for one in known):
        return None
    return ways[0]

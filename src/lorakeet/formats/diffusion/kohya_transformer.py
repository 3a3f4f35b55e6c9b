"""Kohya's keys of FLUX and SD3, to pairs of diffusers' modules and back: one key may be several modules in one matrix.

sd-scripts' `split_qkv` trains three pairs and writes them as one of three times the rank, with alpha unchanged. diffusers and
ComfyUI compute alpha/rank from the tensors in the file; so does this reader.

    W = [W₁; …; Wₙ] by rows      ΔW = s·B·A is split by the rows of B: ΔWᵢ = s·Bᵢ·A
    joined from pairs            A = [A₁; …; Aₙ], B = diag(s₁B₁, …, sₙBₙ); where all Aᵢ are equal, A = A₁ and B = [B₁; …; Bₙ]

Both are exact. A zero column of Bᵢ adds nothing to ΔWᵢ, so splitting drops it with its row of A: from a block-diagonal B every
part gets its own rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakeet.core.adapter import Pair
from lorakeet.errors import Problems, nearest
from lorakeet.formats.components import in_transformer
from lorakeet.formats.diffusion.kohya_keys import Family, TransformerFamily, kohya_key, transformer_modules, written_keys
from lorakeet.formats.files.base_model import BaseModel

_MLP = 4  # default ratio of the MLP's width to that of FLUX's single blocks
_ENCODERS = {"flux": ("text_encoder",), "sd3": ("text_encoder", "text_encoder_2")}  # CLIP's; T5 is never adapted


def of_module(key: str, parts: Sequence[str], pair: Pair) -> dict[str, Pair] | str:
    """The pairs of diffusers' modules `parts` for the pair under `key`, or what is wrong with it."""
    pair = _in_other_order(key, pair)
    if len(parts) == 1:
        return {parts[0]: pair}
    rows = rows_of_parts(len(parts), pair.A.shape[1], pair.B.shape[0])
    if rows is None or pair.kind != "linear":
        names = ", ".join(path.rpartition(".")[2] for path in parts)
        return f"{key} has B {tuple(pair.B.shape)} and A {tuple(pair.A.shape)}, which cannot be split into {names}."
    found = zip(parts, split(pair, rows), strict=True)
    return {path: part for path, part in found if part is not None}


def changes_of_module(key: str, parts: Sequence[str], change: Tensor) -> dict[str, Tensor] | str:
    """As `of_module`, for a dense change (out, in) or one of a convolution."""
    if _is_modulation(key, change.shape[0], change.shape[1]):
        change = change.roll(change.shape[0] // 2, 0)
    rows = [change.shape[0]] if len(parts) == 1 else rows_of_parts(len(parts), change.shape[1], change.shape[0])
    if rows is None:
        return f"has a change {tuple(change.shape)}, which cannot be split into {len(parts)} matrices"
    return dict(zip(parts, split_by_rows(change, rows), strict=True))


def _is_modulation(key: str, rows: int, width: int) -> bool:
    """True for a modulation of two parts: scale and shift in diffusers, shift and scale in the original.

    All other modules have one order in both.
    """
    return key.endswith("_adaLN_modulation_1") and rows == 2 * width


def _in_other_order(key: str, pair: Pair) -> Pair:
    return swapped(pair) if _is_modulation(key, pair.B.shape[0], pair.A.shape[1]) else pair


def keyed(pairs: Mapping[str, Pair], family: TransformerFamily, base: BaseModel | None, problems: Problems) -> dict[str, Pair]:
    """The pairs by kohya's keys, joined if one key is several modules; pairs without a key go to `problems`."""
    found: dict[str, Pair] = {}
    left = dict(pairs)
    for key, parts in written_keys(family).items():
        there = [left.pop(path, None) for path in parts]
        if all(pair is None for pair in there):
            continue
        if len(parts) > 1:
            joined = _joined(parts, there, base)
            if isinstance(joined, str):
                problems.add(joined)
                continue
            found[key] = joined
        elif (pair := there[0]) is not None:
            found[key] = _in_other_order(key, pair)
    for path, pair in left.items():
        clip = not in_transformer(path) and path.partition(".")[0] in _ENCODERS[family]
        if (key_of_clip := kohya_key(path, "sdxl") if clip else None) is not None:  # SDXL's keys: lora_te1, lora_te2
            found[key_of_clip] = pair
        else:
            hint = nearest(path, transformer_modules(family))
            problems.add(f"{path} is no module of {family.upper()} that has a key in kohya's format.{hint}")
    return found


def _joined(parts: Sequence[str], pairs: Sequence[Pair | None], base: BaseModel | None) -> Pair | str:
    """One pair for the modules `parts`, or what is wrong."""
    there = [pair for pair in pairs if pair is not None]
    width = there[0].A.shape[1]
    like = next((pair.B.shape[0] for pair in pairs[:3] if pair is not None), width)
    rows = [like] * 3 + [_mlp(path, pair, width, base) for path, pair in zip(parts[3:], pairs[3:], strict=True)]
    for path, pair, height in zip(parts, pairs, rows, strict=True):
        if pair is not None and (pair.kind != "linear" or pair.A.shape[1] != width or pair.B.shape[0] != height):
            return (
                f"{path} has A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)}, which cannot be joined with its neighbours: "
                f"expected (rank, {width}) and ({height}, rank)."
            )
    lengths = [path for path, pair in zip(parts, pairs, strict=True) if pair is not None and pair.magnitude is not None]
    if lengths and len(lengths) < len(parts):
        without = ", ".join(sorted(set(parts) - set(lengths)))
        return f"{lengths[0]} is DoRA, but {without} is not, and one matrix in kohya's format is all of them."
    return join_pairs(pairs, rows)


def _mlp(path: str, pair: Pair | None, width: int, base: BaseModel | None) -> int:
    """The rows of FLUX's first MLP layer."""
    if pair is not None:
        return pair.B.shape[0]
    shape = None if base is None else base.shape(path)
    return _MLP * width if shape is None else shape[0]


def unread_by_diffusers(pairs: Mapping[str, Pair], family: Family | TransformerFamily) -> str:
    """What diffusers 0.42 does not read of a FLUX or SD3 file with these pairs by keys; empty if it reads all."""
    if family not in _ENCODERS:
        return ""
    if family == "sd3":
        return "diffusers reads no kohya file of SD3; sd-scripts and ComfyUI do. For diffusers write the adapter --to diffusers."
    if any(pair.magnitude is not None for pair in pairs.values()):
        return "diffusers drops the magnitudes of a kohya file of FLUX. For diffusers write the adapter --to diffusers."
    lost = [key for key in pairs if key.startswith("lora_unet_") and not key.startswith(("lora_unet_double", "lora_unet_single"))]
    return (
        f"diffusers does not read the {len(lost)} layers outside the blocks of a kohya file of FLUX ({', '.join(lost[:3])}); "
        "ComfyUI reads them. For diffusers write the adapter --to diffusers."
        if lost
        else ""
    )


def split(pair: Pair, rows: Sequence[int]) -> list[Pair | None]:
    """The pairs of the parts with the given numbers of `rows`; None for a part that the pair does not change.

    A pair that changes nothing becomes one of every part. The scale stays; magnitudes are split by rows.
    """
    blocks = split_by_rows(pair.B, rows)
    live = [part.flatten(1).any(0) for part in blocks]
    nothing = not bool(torch.stack(live).any())
    lengths = [None] * len(rows) if pair.magnitude is None else split_by_rows(pair.magnitude, rows)
    found: list[Pair | None] = []
    for B, columns, magnitude in zip(blocks, live, lengths, strict=True):
        if nothing or bool(columns.all()) or (magnitude is not None and not bool(columns.any())):
            found.append(dataclasses.replace(pair, B=B.contiguous(), magnitude=magnitude))
        elif bool(columns.any()):
            A, rank = pair.A[columns], int(columns.sum())
            found.append(Pair(A, B[:, columns].contiguous(), pair.scale * rank, pair.kind, magnitude=magnitude))
        else:
            found.append(None)
    return found


def split_by_rows(tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Splits `tensor` into parts with the given numbers of `rows`."""
    return [tensor[end - height : end] for end, height in zip(itertools.accumulate(rows), rows, strict=True)]


def join_pairs(pairs: Sequence[Pair | None], rows: Sequence[int]) -> Pair:
    """One pair for the stacked parts; `rows`: the rows of each; None: a part without a pair.

    The scale is that of all parts, or 1 if they differ and are multiplied into B. ValueError if only some are DoRA.
    """
    there = [pair for pair in pairs if pair is not None]
    lengths = [pair.magnitude for pair in there if pair.magnitude is not None]
    if lengths and len(lengths) < len(pairs):
        raise ValueError("only some parts are DoRA")
    scale = there[0].scale if len({pair.scale for pair in there}) == 1 else None
    first = there[0].A
    shared = all(pair.A.shape == first.shape and torch.equal(pair.A, first) for pair in there)
    A = first if shared else torch.cat([pair.A for pair in there])
    blocks: list[Tensor] = []
    column = 0
    for pair, height in zip(pairs, rows, strict=True):
        block = A.new_zeros(height, A.shape[0])
        if pair is not None:
            start = 0 if shared else column
            block[:, start : start + pair.rank] = pair.B if scale is not None else pair.B * pair.scale
            column += pair.rank
        blocks.append(block)
    magnitude = torch.cat(lengths) if lengths else None
    return Pair(A, torch.cat(blocks), (1.0 if scale is None else scale) * A.shape[0], "linear", magnitude=magnitude)


def swapped(pair: Pair) -> Pair:
    """The pair with the two halves of its rows exchanged."""
    half = pair.B.shape[0] // 2
    magnitude = None if pair.magnitude is None else pair.magnitude.roll(half, 0)
    return dataclasses.replace(pair, B=pair.B.roll(half, 0), magnitude=magnitude)


def rows_of_parts(parts: int, width: int, total: int) -> list[int] | None:
    """The rows of each part of `total`: equal for q, k and v; a fourth part, FLUX's MLP, has the rest after three of `width`.

    None if they do not add up.
    """
    if parts <= 3:
        return [total // parts] * parts if total % parts == 0 else None
    rest = total - 3 * width
    return [width, width, width, rest] if rest > 0 else None

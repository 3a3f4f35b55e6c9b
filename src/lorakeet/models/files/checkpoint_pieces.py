"""Where each parameter of a model lies in its files, by transformers' own conversion mapping.

transformers renames tensors as it reads them, stacks the matrices of experts, joins matrices that files keep apart and cuts those
that files keep joined. This only moves numbers, so a change of the parameter is a change of pieces of the files' tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Shape = tuple[int, ...]
Sources = list[tuple[str, str]]  # pattern of the mapping, and name of the tensor


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, in a tensor of the files: the rows `rows` there are the rows `own` of the parameter, or of one
    `expert` of it; None stands for all. `across`: the files store it transposed.
    """

    name: str
    rows: slice | None = None
    expert: int | None = None
    own: slice | None = None
    across: bool = False


def pieces_of(model: Any, shapes: Mapping[str, Shape]) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each parameter of `model`, which may be on the meta device; `shapes` are those of the files' tensors.

    Parameters that the files lack, or that are converted in a way that moves no whole rows, are not in it.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[Piece, ...]] = {}
    joined: dict[str, Sources] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None and target in known:
            found[target] = (Piece(name),)
        elif pattern is not None and target in known:
            joined.setdefault(target, []).append((pattern, name))
    of_model = {name: tuple(tensor.shape) for name, tensor in known.items()}
    for target, sources in joined.items():
        found |= _converted(target, sources, by_pattern[sources[0][0]], shapes, of_model)
    return found


def _converted(
    target: str, sources: Sources, converter: Any, shapes: Mapping[str, Shape], known: Mapping[str, Shape]
) -> dict[str, tuple[Piece, ...]]:
    """The pieces of what `converter` makes of these tensors; nothing where it does more than move rows."""
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    names = [name for _, name in sources]
    if steps in ([(Chunk, 0)], [(Split, 0)]) and len(names) == 1:
        targets = [target.replace(converter.target_patterns[0], pattern) for pattern in converter.target_patterns]
        parts = _in_order([known.get(each, (0,))[0] for each in targets])
        return {each: (Piece(names[0], rows=part),) for each, part in zip(targets, parts, strict=True) if each in known}
    if steps == [(Concatenate, 0)]:
        ordered = _by_pattern(sources, converter)
        parts = _in_order([shapes[name][0] for name in ordered])
        return {target: tuple(Piece(name, own=part) for name, part in zip(ordered, parts, strict=True))}
    if steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return {target: _of_experts(sources, converter, shapes)}
    if [kind for kind, _ in steps] == [Transpose] and len(names) == 1 and len(shapes[names[0]]) == len(known[target]):
        return {target: (Piece(names[0], across=shapes[names[0]] != known[target] or not converter.operations[0].check_dims),)}
    return {}


def _of_experts(sources: Sources, converter: Any, shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
    """One matrix, or several one under the other, of each expert."""
    matrices = [[name for own, name in sources if own == pattern] for pattern in converter.source_patterns]
    rows = _in_order([shapes[names[0]][0] if names else 0 for names in matrices])
    whole = len(matrices) == 1
    return tuple(
        Piece(name, expert=number, own=None if whole else part)
        for part, names in zip(rows, matrices, strict=True)
        for number, name in enumerate(names)
    )


def _by_pattern(sources: Sources, converter: Any) -> list[str]:
    return [name for pattern in converter.source_patterns for own, name in sources if own == pattern]


def _in_order(counts: list[int]) -> list[slice]:
    return [slice(first, last) for first, last in pairwise(accumulate(counts, initial=0))]

"""Which blocks of a text model lie below every trained tensor, and the states that they make of all rows of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lorakeet.data.chat import Example
from lorakeet.data.pack import pack
from lorakeet.memory.spill import Aside
from lorakeet.models import modules
from lorakeet.models.frozen_prefix import FrozenPrefix
from lorakeet.models.text import TextModel


def frozen_depth(text: TextModel) -> int:
    """How many of the lowest blocks, and what comes before them, hold nothing that is trained; 0 where that is of no use.

    It cannot where the model is streamed, pads its rows, drops numbers in training, or trains its embedding.
    """
    settings = vars(text.model.config.get_text_config())
    drops = any(rate for name, rate in settings.items() if "drop" in name and isinstance(rate, float))
    embedding = text.model.get_input_embeddings()  # with what stands for it
    if text.streamed is not None or text.attention != "varlen" or drops or embedding is None or _is_trained(embedding):
        return 0
    trained = [number for number, path in enumerate(_paths(text)) if _is_trained(modules.find(text.model, path))]
    return min(trained, default=0)


@contextmanager
def prefix_states(
    text: TextModel, rows: Sequence[Example], *, folder: Path | None, micro_tokens: int
) -> Iterator[FrozenPrefix | None]:
    """A context in which passes over `rows` begin above the lowest blocks that hold nothing trained; None where there are none.

    Their states are computed at its beginning and kept in a scratch file in `folder`, which vanishes with the process, or in
    memory. Rows pass in an order of their own, by length, so that the same rows always give the same bits: a resumed run
    computes them again. Raises EnvironmentProblem where the disk is full.
    """
    depth = frozen_depth(text) if rows else 0
    if not depth:
        yield None
        return
    prefix = FrozenPrefix(text.model, _paths(text), depth, Aside(folder))
    try:
        text.model.eval()
        for part in _parts(rows, micro_tokens):
            batch = pack(part)
            with torch.no_grad(), text.every_token(), prefix.recording() as found:
                text.hidden(batch)
            prefix.keep(batch.ids, batch.lengths, found[-1][0])
        text.prefix = prefix
        yield prefix
    finally:
        text.prefix = None
        prefix.close()


def _parts(rows: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """The different rows from the shortest to the longest, cut into parts of at most `micro_tokens` tokens."""
    different = {row.ids.tobytes(): row for row in rows}
    found: list[list[Example]] = []
    room = 0
    for _, row in sorted(different.items(), key=lambda item: (len(item[0]), item[0])):
        if not found or len(row.ids) > room:
            found.append([])
            room = micro_tokens
        found[-1].append(row)
        room -= len(row.ids)
    return found


def _paths(text: TextModel) -> list[str]:
    prefix, count = modules.block_prefix(text.model, text.family)
    return [f"{prefix}.{number}" for number in range(count)]


def _is_trained(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())

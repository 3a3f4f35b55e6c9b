"""Rotary positions whose frequencies depend on the length of a text (longrope of Phi-3 and its relatives), for rows of a batch.

transformers takes the longest text of a batch for all of its rows; here each row has the frequencies of its own length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.layers.linear import Replacement
from lorakeet.models import modules

LONGROPE = "longrope"
_ORIGINAL = "original_max_position_embeddings"


def switch_length(config: Any) -> int | None:
    """The most tokens of a text with the frequencies of short texts; None for a model whose frequencies are the same for all."""
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [given, *(part for part in given.values() if isinstance(part, dict))]
    found = [part.get(_ORIGINAL) for part in kinds if part.get("rope_type") == LONGROPE]
    return min((int(length) for length in found if length), default=None)


def choose_by_row(model: nn.Module) -> None:
    """Wraps the rotary embeddings of a model whose frequencies depend on the length of a text."""
    switch = switch_length(model.config) if hasattr(model, "config") else None
    if switch is None:
        return
    for path, module in list(modules.original_modules(model)):
        kinds = getattr(module, "rope_type", None)
        if LONGROPE in (kinds.values() if isinstance(kinds, dict) else [kinds]) and not isinstance(
            modules.find(model, path), RowRotary
        ):
            modules.replace(model, path, RowRotary(module, switch))


class RowRotary(Replacement):
    """A rotary embedding that knows which tokens belong to rows longer than `switch` tokens."""

    def __init__(self, original: nn.Module, switch: int) -> None:
        super().__init__(original)
        self.switch = switch
        self.long: Tensor | None = None  # bool (1, tokens) or (rows, 1); None: the positions are those of rows of one kind

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines (rows, tokens, numbers) for `position_ids` (rows, tokens)."""
        if self.long is None:
            return self._original(x, position_ids, *args, **settings)
        beyond = position_ids.new_full((len(position_ids), 1), self.switch)  # a text that reaches there is long
        short = self._original(x, position_ids.clamp_max(self.switch - 1), *args, **settings)
        long = self._original(x, torch.cat([position_ids, beyond], 1), *args, **settings)
        cos, sin = (torch.where(self.long[..., None], b[:, :-1], a) for a, b in zip(short, long, strict=True))
        return cos, sin

    def _original(self, x: Tensor, positions: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.original(x, positions, *args, **settings)
        return cos, sin


def lengths_differ(switch: int | None, lengths: Sequence[int]) -> bool:
    """Whether some of the rows of these lengths in tokens are longer than `switch` and others not."""
    return switch is not None and min(lengths) <= switch < max(lengths)


@contextmanager
def separated(rotaries: Sequence[RowRotary], long: Tensor | None) -> Iterator[None]:
    """A context in which the rotary embeddings know which tokens belong to long rows."""
    for rotary in rotaries:
        rotary.long = long
    try:
        yield
    finally:
        for rotary in rotaries:
            rotary.long = None

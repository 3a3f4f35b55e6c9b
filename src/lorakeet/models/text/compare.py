"""Runs two models, or one with two adapters, on the same batches and compares their logits chunk by chunk.

Two streamed models run one after the other, so that only one has blocks in memory; the hidden states of the first are spilled to
disk beside its store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch
from lorakeet.evaluate.parity import Parity, ParityMeter
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.memory.spill import Spill
from lorakeet.models.inject import activate
from lorakeet.models.text.model import TextModel

CHUNK = 256  # positions whose logits are in memory at once

Side = tuple[TextModel, str | None]  # a model and its active adapter (None for the bare base)


def compare_outputs(left: Side, right: Side, batches: Sequence[Batch], *, spec: EvaluateSpec) -> Parity:
    """Compares `right` with `left` on the targets of `batches`; they may be one model with different adapters."""
    meter = ParityMeter()
    with torch.no_grad():
        for number, (batch, (hidden_left, hidden_right)) in enumerate(zip(batches, _states(left, right, batches), strict=True)):
            rows = batch.target_rows.tolist()
            for start in range(0, batch.targets, CHUNK):
                part = slice(start, start + CHUNK)
                meter.add(
                    left[0].head(hidden_left[part]),
                    right[0].head(hidden_right[part]),
                    targets=batch.target_ids[part],
                    texts=[(number, row) for row in rows[part]],
                )
    return meter.result(spec)


def _states(left: Side, right: Side, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the hidden states of both sides at the targets of each batch, (targets, hidden)."""
    apart = left[0].model is not right[0].model and left[0].streamed is not None and right[0].streamed is not None
    store = left[0].store
    if not apart or store is None:
        for batch in batches:
            yield _hidden(left, batch), _hidden(right, batch)
        return
    first = Spill(store.path.parent, "Free some space, or name another folder with memory.store.")
    try:
        for number, batch in enumerate(batches):
            first.put(number, _hidden(left, batch))
        left[0].release()
        for number, batch in enumerate(batches):
            yield first.take(number), _hidden(right, batch)
        right[0].release()
    finally:
        first.close()


def _hidden(side: Side, batch: Batch) -> Tensor:
    text, name = side
    activate(text.model, name)
    text.model.eval()
    return text.hidden(batch.to(text.device))


def first_tokens(examples: Sequence[Example], tokens: int) -> list[Example]:
    """Returns the first examples of at most `tokens` tokens together; at least one."""
    chosen: list[Example] = []
    for example in examples:
        tokens -= len(example.ids)
        if chosen and tokens < 0:
            break
        chosen.append(example)
    return chosen

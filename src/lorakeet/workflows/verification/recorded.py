"""What an artefact answers to every probe, asked beforehand and kept: of the two sides of a check one is in memory at a time.

    artefact ──► ids, texts; logits part by part into a scratch file ──► it goes ──► the live model, compared with what was kept

The checks (workflows/verification/checks) are the same, number by number: they get the answers from here, in place of the
artefact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lorakeet.export.merged_tensors import StoredTensor
from lorakeet.memory.spill import Spill
from lorakeet.models.generate.sample import end_ids
from lorakeet.workflows.planning.check_sizes import GREEDY_TOKENS
from lorakeet.workflows.runs.open_adapter import Opened
from lorakeet.workflows.verification.artefact import Artefact, InTorch, Messages
from lorakeet.workflows.verification.checks import Probes, answer

Answer = TypeVar("Answer")


class RecordedArtefact:
    """An artefact's answers, as an `Artefact`: answers are cached, and the only ones left once the artefact is closed."""

    def __init__(self, artefact: Artefact, spill: Spill) -> None:
        """Logits wait in `spill`, which the caller closes."""
        self.name, self.allowed = artefact.name, artefact.allowed
        self._artefact: Artefact | None = artefact
        self._spill = spill
        self._known: dict[Hashable, Any] = {}

    def let_go(self) -> None:
        """Forgets the artefact; what it was not asked raises KeyError from now on."""
        self._artefact = None

    def tokenise(self, text: str) -> list[int]:
        return self._once(("ids", text), lambda artefact: artefact.tokenise(text))

    def prompt(self, messages: Messages) -> list[int] | None:
        return self._once(("prompt", json.dumps(messages)), lambda artefact: artefact.prompt(messages))

    def greedy(self, prompt: Sequence[int], tokens: int, ends: frozenset[int]) -> list[int]:
        key = ("text", tuple(prompt), tokens, ends)
        return self._once(key, lambda artefact: artefact.greedy(prompt, tokens, ends))

    def logits(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        key = ("logits", tuple(ids), last)
        self._once(key, lambda artefact: self._spill.put(key, artefact.logits(ids, last)))
        return self._spill.get(key)

    def logit_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        row = tuple(ids)
        for number in range(self._once(("parts", row), lambda artefact: self._put(row, artefact.logit_parts(ids)))):
            yield self._spill.get((row, number))

    def stored(self, source: Path, opened: Opened) -> dict[str, StoredTensor]:
        return self._once(("stored", source), lambda artefact: artefact.stored(source, opened))

    def _put(self, row: tuple[int, ...], parts: Iterator[Tensor]) -> int:
        count = 0
        while (part := next(parts, None)) is not None:
            self._spill.put((row, count), part)
            del part  # before the next one is computed
            count += 1
        return count

    def _once(self, key: Hashable, ask: Callable[[Artefact], Answer]) -> Answer:
        if key not in self._known:
            if self._artefact is None:
                raise KeyError(key)
            self._known[key] = ask(self._artefact)
        found: Answer = self._known[key]
        return found


def ask_all(artefact: Artefact, probes: Probes, live: InTorch, spill: Spill) -> RecordedArtefact:
    """Asks `artefact` all that the checks of `probes` will ask it. Of `live` only the tokenizer is used: no block comes in."""
    found = RecordedArtefact(artefact, spill)
    for messages, _ in probes.conversations:
        found.prompt(messages)
    for text in probes.texts:
        found.tokenise(text)
    for ids in probes.rows:
        for _ in found.logit_parts(ids.tolist()):
            pass
    for row in probes.labelled:
        answer(found, row, live)
    ends = end_ids(live.text)
    for prompt in probes.prompts:
        found.greedy(prompt.tolist(), GREEDY_TOKENS, ends)
    return found

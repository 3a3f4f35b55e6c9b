"""What goes through both sides of a comparison: held-out rows of a run, or texts that the base samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from lorakeet.data.chat import Candidates, Encoder, Ids
from lorakeet.data.prepare import Dataset
from lorakeet.data.rows import Row
from lorakeet.data.template import is_templated
from lorakeet.models.generate.sample import sampled_texts
from lorakeet.planning.check import SAMPLED_TEXTS, SAMPLED_TOKENS, compared_rows
from lorakeet.runs.open_adapter import Opened
from lorakeet.verification.artefact import InTorch, Messages


@dataclass(frozen=True)
class Probes:
    """What goes through both sides: held-out conversations, raw texts, whole rows as ids, and labelled prompts."""

    conversations: Sequence[tuple[Messages, Ids]]  # messages, and the ids of the prompt in training
    texts: Sequence[str]
    rows: Sequence[Ids]
    labelled: Sequence[Candidates]
    prompts: Sequence[Ids]  # for greedy texts
    most: int | None = None  # tokens of each that are compared; None: all
    too_long: int = 0  # labelled prompts that were longer, and are left out
    further: Callable[[int], Sequence[Candidates]] = lambda count: ()  # up to so many more labelled prompts
    pool: Callable[[], Sequence[Ids]] = tuple  # further held-out rows, for a server of which more must be seen

    def cut_to(self, most: int | None) -> Probes:
        """Rows and prompts for greedy texts up to their first `most` tokens; without labelled prompts that have more."""
        if most is None:
            return self
        rows, prompts = ([ids[:most] for ids in texts] for texts in (self.rows, self.prompts))
        labelled = [row for row in self.labelled if len(row.prompt) + max(map(len, row.completions)) <= most]
        return replace(
            self, rows=rows, prompts=prompts, labelled=labelled, most=most, too_long=len(self.labelled) - len(labelled)
        )
TEXTS, GREEDY = 8, 4  # raw texts, greedy continuations
RAW_TEXTS = ("It's 10:30 on 12/04.", "naïve café, 日本語 🙂", "two  spaces\n\n\tand a tab", "x = y+1; // 1,234.5")
POOL = 128  # further held-out rows, of which a server's proof may take some


def probes_of(opened: Opened, dataset: Dataset | None, live: InTorch, rows: int) -> Probes:
    """Held-out rows of the run; for a bare adapter, texts that the base samples. DataError where no row is short enough."""
    if dataset is None:
        spec = opened.config.evaluate
        sampled = [example.ids for example in sampled_texts(live.text, SAMPLED_TEXTS, SAMPLED_TOKENS, seed=spec.seed)]
        return Probes([], RAW_TEXTS, sampled, [], [ids[: max(1, len(ids) // 2)] for ids in sampled[:GREEDY]])
    encoder = Encoder(live.text.tokenizer, opened.config.data, dataset.labels)
    chosen, labelled = compared_rows(dataset, encoder, rows)
    starts = [int(np.flatnonzero(example.supervised)[0]) for _, example in chosen]
    prompts = [example.ids[:start] for (_, example), start in zip(chosen, starts, strict=True)]
    talks: list[tuple[Messages, Ids]] = [
        (_messages(row), prompt)
        for (row, _), prompt in zip(chosen, prompts, strict=True)
        if is_templated(row, live.text.tokenizer, opened.config.data) and len(_messages(row)) > 0
    ]
    texts = (*RAW_TEXTS, *(row.text for row, _ in chosen[:TEXTS]))
    ids = [example.ids for _, example in chosen]
    longest = opened.residency.way.longest or (max(map(len, ids)) if opened.config.memory.limit else None)
    others = [row for row in dataset.held_out if not any(row is one for one, _ in chosen)]
    further = partial(_further, others, encoder, longest) if labelled and opened.residency.store is None else _no_further
    pool = partial(_pool, others, encoder, longest) if opened.residency.store is None else tuple
    found = Probes(talks, texts, ids, labelled, prompts[:GREEDY], further=further, pool=pool)
    return found.cut_to(opened.residency.way.longest)


def _pool(rows: Sequence[Row], encoder: Encoder, longest: int | None) -> list[Ids]:
    """The ids of the first POOL whole rows within the memory plan."""
    encoded = (found for row in rows if (found := encoder.encode(row)) is not None and not found.truncated)
    return list(islice((one.ids for one in encoded if longest is None or len(one.ids) <= longest), POOL))


def _no_further(count: int) -> list[Candidates]:
    """Outputs of more rows would wait on disk beyond what was planned."""
    return []


def _further(rows: Sequence[Row], encoder: Encoder, longest: int | None, count: int) -> list[Candidates]:
    """The labelled prompts of the first `count` rows that are whole, and within the memory plan: `longest` tokens."""
    encoded = (found for row in rows if (found := encoder.candidates(row)) is not None and not found.truncated)
    fitting = (one for one in encoded if longest is None or len(one.prompt) + max(map(len, one.completions)) <= longest)
    return list(islice(fitting, count))


def _messages(row: Row) -> Messages:
    """The turns before the first that the model is to write."""
    number = next((place for place, turn in enumerate(row.turns) if turn.supervised), 0)
    return [{"role": turn.role, "content": turn.text} for turn in row.turns[:number]]

"""Labels of new texts by a run on labelled rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorakeet.api.arguments import given_as
from lorakeet.data.chat import Encoder
from lorakeet.data.rows import Row
from lorakeet.data.shapes import shape_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import ConfigError
from lorakeet.evaluate.likelihood import label_log_probs
from lorakeet.models.generate.score import label_scores
from lorakeet.models.text.model import TextModel


@dataclass(frozen=True)
class LabelAnswer:
    """The likeliest label of a text, its probability, and those of all labels."""

    label: str
    probability: float
    probabilities: dict[str, float]


def classified(
    text: TextModel, inputs: Sequence[str | Mapping[str, Any]], spec: DataSpec, labels: Sequence[str], *, micro_tokens: int
) -> list[LabelAnswer]:
    """The answer to each text, or to each record with the columns of the template, by the model as it is now.

    Probabilities are the softmax of the labels' log-probabilities, as the report measures them. Raises ConfigError for a run
    without labels and for what is neither text nor record, DataError for a record without a column, and for one that is too long.
    """
    for number, one in enumerate(inputs):  # those of a generator or a column too, which annotations do not reach
        if not isinstance(one, (str, Mapping)):
            raise ConfigError(f"texts[{number}] is {given_as(one)}; expected text or a dict.")
    if not labels:
        raise ConfigError("The run's rows have no labels; classify is for runs on labelled rows. Use generate.")
    encoder = Encoder(text.tokenizer, replace(spec, too_long="refuse"), labels)
    candidates = [found for row in _rows(inputs, spec, labels[0]) if (found := encoder.candidates(row)) is not None]
    if not candidates:
        return []
    probabilities = np.exp(label_log_probs(label_scores(text, candidates, micro_tokens=micro_tokens)))
    return [
        LabelAnswer(labels[int(row.argmax())], float(row.max()), dict(zip(labels, row.tolist(), strict=True)))
        for row in probabilities
    ]


def _rows(inputs: Sequence[str | Mapping[str, Any]], spec: DataSpec, label: str) -> Iterator[Row]:
    """The texts as rows, each with a label that is not looked at."""
    column = spec.label_column or "label"
    records = (
        FileRecord(f"text {number}", {**({spec.text_column: one} if isinstance(one, str) else one), column: label})
        for number, one in enumerate(inputs, start=1)
    )
    problems = RowProblems("These texts cannot be classified")
    yield from shape_rows(records, "the texts", replace(spec, format="classification", group_column=None), problems)
    problems.raise_if_any()

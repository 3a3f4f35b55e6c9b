"""What is known before a run about its measurement: how wide intervals will be, whether test rows exist, what prompts name."""

from __future__ import annotations

from dataclasses import dataclass

from lorakeet.data.prepare import Dataset, template_remedy, unnamed_labels_note
from lorakeet.data.spec import DataSpec
from lorakeet.errors import Remedy
from lorakeet.evaluate.intervals import proportion
from lorakeet.evaluate.wording import metric_words

FEW = 100  # measured rows below which the interval of an accuracy is named
RIGHT = 0.8  # of the rows, for which it is


@dataclass(frozen=True)
class Remark:
    """A sentence for the user, and the settings that would mend what it says."""

    words: str
    remedies: tuple[Remedy, ...] = ()


def remarks_on(dataset: Dataset, spec: DataSpec, *, few_shot: bool) -> tuple[Remark, ...]:
    """The remarks on a run over these rows; `few_shot`: a few-shot base is compared."""
    measured, found = len(dataset.test or dataset.held_out), []
    train, labels, doubtful = dataset.train, dataset.labels, dataset.doubtful
    if 0 < measured < FEW:
        found.append(Remark(few_rows_note(measured, labelled=bool(labels))))
    if measured and not dataset.test:
        found.append(
            Remark(
                "There are no test rows: the checkpoint will be chosen on the same held-out rows that it is measured on, which "
                "flatters it a little. To measure on others, put some rows into a file of their own and name it as data.test."
            )
        )
    if note := unnamed_labels_note(train, labels, spec.template, few_shot=few_shot, doubtful=doubtful):
        remedy = template_remedy(train, labels, spec.template, doubtful)
        found.append(Remark(note, () if remedy is None else (remedy,)))
    return tuple(found)


def few_rows_note(count: int, *, labelled: bool) -> str:
    """What so few rows to measure on mean: for labels, the 95 % interval of an accuracy near RIGHT."""
    rows, advice = "row is" if count == 1 else "rows are", "Hold out more: data.held_out_fraction. Or name data.test."
    said = f"{count:,} {rows} few to measure on, so intervals will be wide"
    if not labelled:
        return f"{said}. {advice}"
    right = max(1, round(RIGHT * count))
    interval = proportion(right, count)
    words = metric_words("accuracy")
    reach = f"its 95 % interval {words.ends(interval)}"
    return f"{said}: with {right} of {count} right, the accuracy is {words.level(interval.value)} and {reach}. {advice}"

"""Reads and splits all rows of a run, and checks them for leaks and labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lorakeet.data.copies.answer_copies import answer_copy_notes
from lorakeet.data.copies.prompt_leaks import prompt_leak_notes
from lorakeet.data.leaks import CleanParts, LeakReport, check_leaks
from lorakeet.data.proposals.answers import broken_json_notes
from lorakeet.data.proposals.labels import alike, doubtful_labels, label_notes, merging
from lorakeet.data.read import read_rows
from lorakeet.data.rows import Row, some_sources
from lorakeet.data.shapes import added_shapes
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import Split, by_content, split_record, split_rows
from lorakeet.errors import DataError, Problems, Remedy, nearest, spelt
from lorakeet.registry import Objective, first_objective

_SAMPLED = 16  # rows, whose prompts are of one template
_LONGEST = 1000  # characters of all labels in a proposed template


@dataclass(frozen=True)
class Dataset:
    """Training, held-out and test rows; `labels` is empty if rows have none."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...]
    leaks: LeakReport
    notes: tuple[str, ...] = ()  # sentences about rows that were dropped or stand in prompts, and about labels
    remedies: tuple[Remedy, ...] = ()  # settings that `notes` propose

    @property
    def label_counts(self) -> dict[str, int]:
        """How many training rows each label has."""
        return label_counts(self.train, self.labels)

    @property
    def doubtful(self) -> set[str]:
        """The labels that may be slips (`doubtful_labels`)."""
        return doubtful_labels(label_counts((*self.train, *self.held_out, *self.test), self.labels))

    def split_record(self) -> dict[str, object]:
        """The content of split.json."""
        return split_record(self.train, self.held_out, self.test, labels=self.labels)


def load_dataset(
    spec: DataSpec, registered: Objective | None = None, *, most_compared: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Dataset:  # fmt: skip
    """Loads the rows that `spec` describes and applies its leak policy. Raises ConfigError or DataError.

    `registered` is what is trained, which says of what shape the rows must be; left out, that is the default. More rows than
    `most_compared` are split only: copies are neither searched nor dropped, and `leaks.searched` is empty. `say` is given what
    is done, in words.
    """
    registered = first_objective() if registered is None else registered
    spec.validate()
    notes: list[str] = []
    remedies: list[Remedy] = []
    rows = read_rows(spec.train, spec, notes, registered, remedies, say)
    test = read_rows(spec.test, spec, notes, registered) if spec.test else []
    if spec.held_out:
        split = Split(by_content(rows, spec.split_seed), tuple(read_rows(spec.held_out, spec, notes, registered)))
    else:
        split = split_rows(rows, spec)
    if say is not None:
        say(f"Searches {len(rows) + len(test):,} rows for copies")
    # Checked before and after: the leak check may remove all training rows of a label.
    find_labels(split.train, spec)
    if most_compared is None or len(rows) + len(test) <= most_compared:
        clean = check_leaks(split.train, split.held_out, test, spec)
    else:
        clean = CleanParts(split.train, split.held_out, tuple(test), LeakReport((), spec.on_leak, threshold=0.0))
    labels = find_labels(clean.train, spec)
    check_labels({"held-out": clean.held_out, "test": clean.test}, labels, spec.rename_labels)
    parts = {"training": clean.train, "held-out": clean.held_out, "test": clean.test}
    if clean.report.searched:
        notes += prompt_leak_notes(parts, spec.on_leak)
        notes += answer_copy_notes(parts)
    every = [row for rows in parts.values() for row in rows]
    notes += label_notes(label_counts(every, labels), spec.rename_labels)
    notes += broken_json_notes(every)
    shaped = [registered.taken(rows, part, trained=part == "training") for part, rows in parts.items()]
    measured = {part: rows for part, rows in parts.items() if part != "training"}
    notes += [note for shape in added_shapes().values() for note in shape.part_notes(measured)]
    return Dataset(shaped[0], shaped[1], shaped[2], labels, clean.report, tuple(notes), tuple(remedies))


def label_counts(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, int]:
    """How many of `rows` each label has."""
    counts = Counter(row.label for row in rows)
    return {label: counts[label] for label in labels}


def unnamed_labels_note(
    rows: Sequence[Row], labels: Sequence[str], template: str, *, few_shot: bool, doubtful: Collection[str] = ()
) -> str:
    """A sentence if the prompts of labelled `rows` do not name all labels, with a `template` that does; else an empty string.

    `few_shot`: a few-shot base is compared, which sees them. The template leaves out `doubtful` labels, and the sentence says so.
    """
    certain = [label for label in labels if label not in doubtful]
    left_out = [label for label in labels if label in doubtful and not _all_named(rows, [label])]
    listed, one = ", ".join(map(repr, left_out)), len(left_out) == 1
    if _all_named(rows, certain):
        question = "a typo? If it is meant, name it in data.template." if one else "typos? If they are meant, name them too."
        return f"The prompts name all labels but {listed}: {question}" if left_out else ""
    advice = " The few-shot base sees them." if few_shot else ""
    remedy = template_remedy(rows, labels, template, doubtful)
    if remedy is None:
        proposal = f"Their names have more than {_LONGEST:,} characters: name them in data.template if prompts can be so long."
    else:
        question = "a typo: is it? If not, add it." if one else "typos: are they? If not, add them."
        proposal = f"To train with their names, set data.template, for instance {remedy.value!r}."
        proposal += f" That leaves out {listed}, which may be {question}" if left_out else ""
    return (
        f"The prompts do not name all {len(labels)} labels, so the base cannot know them: part of the gain over it may be just "
        f"that.{advice} {proposal}"
    )


def template_remedy(
    rows: Sequence[Row], labels: Sequence[str], template: str, doubtful: Collection[str] = ()
) -> Remedy | None:
    """A template that names all labels but `doubtful` ones.

    None if the prompts of `rows` name them, if there are no labels, or if the names are too long for every prompt.
    """
    certain = [label for label in labels if label not in doubtful]
    names = ", ".join(label.replace("{", "{{").replace("}", "}}") for label in certain)
    if len(names) > _LONGEST or _all_named(rows, certain):
        return None
    return Remedy("data.template", f"{template}\nAnswer with one of: {names}", "Name the labels in the prompt")


def _all_named(rows: Sequence[Row], labels: Sequence[str]) -> bool:
    """True if the prompts have each label as a whole word."""
    prompts = [" ".join(turn.text for turn in row.turns[:-1]) for row in rows[:_SAMPLED]]
    words = (re.compile(rf"(?<!\w){re.escape(label)}(?!\w)", re.I) for label in labels)
    return all(word.search(prompt) for word in words for prompt in prompts)


def find_labels(train: Sequence[Row], spec: DataSpec) -> tuple[str, ...]:
    """The labels in the spec's order, or those of the training rows, sorted; empty if rows have none.

    Raises DataError for a single label, or if the spec names one that no training row has.
    """
    counts = Counter(row.label for row in train if row.label is not None)
    if not counts:
        return ()
    if len(counts) == 1:
        only = next(iter(counts))
        raise DataError(
            f"All {counts[only]} training rows have the label {only!r}; a classification needs at least two labels. "
            f"Check {spelt('data.label_column')}."
        )
    unseen = [label for label in spec.labels if label not in counts]
    if unseen:
        raise DataError(
            f"No training row has the label {', '.join(map(repr, unseen))} of data.labels; the training rows have "
            f"{', '.join(map(repr, sorted(counts)))}.{nearest(unseen[0], counts)}"
        )
    return spec.labels or tuple(sorted(counts))


def check_labels(
    parts: dict[str, Sequence[Row]], labels: Sequence[str], renamed: Mapping[str, str] | None = None
) -> None:
    """Raises a DataError that names each label of these rows that is missing from `labels`, with its rows.

    With `renamed`, which is data.rename_labels, it advises to read labels as those that differ in case or spaces only.
    """
    wrong = {row.label for rows in parts.values() for row in rows if row.label is not None} - {*labels}
    known = alike({**dict.fromkeys(wrong, 0), **dict.fromkeys(labels, 1)})
    names = {name: meant for meant, others in known.items() for name in others if name in wrong and meant in labels}
    remedies = [merging(names, renamed)] if names and renamed is not None else []
    advice = f"If labels that differ in case or spaces only are one, set {remedies[0].flag}." if remedies else ""
    problems = Problems("Rows cannot be evaluated", DataError, remedy=advice, remedies=remedies)
    for part, rows in parts.items():
        unseen: dict[str, list[str]] = {}
        bare = [row.source for row in rows if labels and row.label is None]
        if bare:
            named = some_sources(bare)
            problems.add(f"{len(bare)} {part} rows ({named}) have no label, but the training rows do; label them too.")
        for row in rows:
            if row.label is not None and row.label not in labels:
                unseen.setdefault(row.label, []).append(row.source)
        for label, sources in unseen.items():
            problems.add(
                f"The label {label!r} of {len(sources)} {part} rows ({some_sources(sources)}) is unseen in training, which has "
                f"{', '.join(map(repr, labels)) or 'no labels'}; remove the rows or add some to training.{nearest(label, labels)}"
            )
    problems.raise_if_any()

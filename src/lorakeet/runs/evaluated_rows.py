"""Which rows an adapter is evaluated on: those of its run or of a file, without the ones that the run has seen."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakeet.config import RunConfig
from lorakeet.data.copies.prompt_leaks import prompt_leak_notes
from lorakeet.data.leaks import LeakReport, search_leaks
from lorakeet.data.prepare import check_labels, find_labels
from lorakeet.data.read import read_rows
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import read_split_record
from lorakeet.data.tables import given_name
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, LorakeetError
from lorakeet.runs.open_adapter import Opened

HELD_OUT = "the held-out rows"


@dataclass(frozen=True)
class EvaluatedRows:
    """The rows to evaluate on, their name and labels, and the rows that simple baselines are fitted to."""

    rows: tuple[Row, ...]
    named: str
    labels: tuple[str, ...]
    baseline_rows: tuple[Row, ...]
    leaks: LeakReport | None = None
    warnings: tuple[str, ...] = ()


def rows_of_run(opened: Opened) -> EvaluatedRows:
    """The test rows of a run, else its held-out ones. ConfigError for an adapter without a run."""
    if not opened.config.data.train:
        raise ConfigError("An adapter without a run has no rows. Name a file with --data, or a run file with --config.")
    dataset = opened.dataset
    if dataset.test:
        return EvaluatedRows(dataset.test, "the test file", dataset.labels, (*dataset.train, *dataset.held_out))
    return EvaluatedRows(dataset.held_out, HELD_OUT, dataset.labels, dataset.train)


def _named(data: str) -> str:
    return Path(data).name if given_name(data) == data else given_name(data)


def rows_of_file(opened: Opened, data: str) -> EvaluatedRows:
    """The rows of `data`, read as the run's rows are, with the labels of the run or else of the file.

    The run's own rows are used for the leak check and the baselines only: if they cannot be read, a warning says so.
    """
    settings: RunConfig = opened.config
    dropped: list[str] = []
    registered = settings.train.registered
    given = read_rows(data, dataclasses.replace(settings.data, limit=None), dropped, registered)
    rows = registered.taken(given, "evaluated", trained=False)
    dropped += prompt_leak_notes({"evaluated": rows}, settings.data.on_leak)
    if not settings.data.train:
        return EvaluatedRows(rows, _named(data), find_labels(rows, settings.data), (), warnings=tuple(dropped))
    try:
        dataset = opened.dataset
    except (DataError, EnvironmentProblem) as error:
        found_rows = _rows_without_training(opened, rows, _named(data), error)
        return dataclasses.replace(found_rows, warnings=(*dropped, *found_rows.warnings))
    require_shape(rows, dataset.labels, settings.data, _named(data))
    check_labels({"evaluated": rows}, dataset.labels)
    known = (*dataset.train, *dataset.held_out)
    left, found = _without_seen(rows, known, settings.data)
    seen = len(rows) - len(left)
    fate = "left out" if settings.data.on_leak == "drop" else "kept, as data.on_leak says: the verdict is not on unseen rows"
    said = [f"{_counts_of_copies(rows, found, seen or len(found.across))} ({fate})."] if found.across else []
    return EvaluatedRows(left, _named(data), dataset.labels, known, found, (*dropped, *said))


def require_shape(rows: Sequence[Row], labels: Sequence[str], trained: DataSpec, named: str) -> None:
    """Raises DataError for a file of labelled texts where the run has none, and the other way round."""
    labelled = [row.label is not None for row in rows]
    if labels and not any(labelled):
        columns = f"{trained.text_column!r} and {trained.label_column or 'label'!r}"
        raise DataError(
            f"{named} has no labels, but the run was trained on labelled texts. Give a file with the columns {columns}. Rows "
            "without labels are answered by: lorakeet predict"
        )
    if all(labelled) and not labels:
        like = f", {Path(trained.train).name}" if trained.train else ""
        raise DataError(
            f"{named} has texts with a label, but the run was trained on rows of another shape. Give a file with the columns of "
            f"its training rows{like}."
        )


def _counts_of_copies(rows: Sequence[Row], found: LeakReport, count: int) -> str:
    """How many of the rows the run has seen, and how many of them are only near-copies of what it has seen."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for pair in found.across:
        kinds[pair.row.source if pair.row_part == "test" else pair.twin.source].add(pair.kind)
    near = sum(kind == {"near"} for kind in kinds.values())
    if near == len(kinds):
        return f"{count} of {len(rows)} rows are near-copies of training or held-out rows"
    also = f", {near} of them as near-copies" if near else ""
    return f"{count} of {len(rows)} rows are also training or held-out rows{also}"


def _rows_without_training(opened: Opened, rows: tuple[Row, ...], named: str, why: LorakeetError) -> EvaluatedRows:
    """The rows of a file if the run's are gone: labels and hashes of the held-out rows are in its split.json."""
    policy = opened.config.data.on_leak
    if opened.run is None or policy == "refuse":
        raise why
    record = read_split_record(opened.run.split)
    labels, held_out = record.get("labels"), record["held_out"]
    if not isinstance(labels, list) or not isinstance(held_out, list):
        raise why
    require_shape(rows, [*map(str, labels)], opened.config.data, named)
    check_labels({"evaluated": rows}, [*map(str, labels)])
    seen = set(map(str, held_out))
    left = tuple(row for row in rows if row.key not in seen) if policy == "drop" else rows
    if not left:
        raise DataError(f"All {len(rows)} rows are held-out rows of the run. Name a file of other rows.") from why
    said = [f"The run's own rows cannot be read ({why}) So copies of training rows were not removed, and there are no baselines."]
    if len(left) < len(rows):
        said.append(f"{len(rows) - len(left)} of {len(rows)} rows are held-out rows of the run (left out).")
    return EvaluatedRows(left, named, tuple(map(str, labels)), (), None, tuple(said))


def _without_seen(rows: tuple[Row, ...], known: tuple[Row, ...], spec: DataSpec) -> tuple[tuple[Row, ...], LeakReport]:
    """The rows without those that the run has seen, as data.on_leak says, and the leaks that were found."""
    found = search_leaks({"training": known, "test": rows}, spec)
    pairs = found.across
    sources = {pair.row.source if pair.row_part == "test" else pair.twin.source for pair in pairs}
    seen = tuple(row for row in rows if row.source in sources)
    if pairs and spec.on_leak == "refuse":
        advice = "Remove them, or set data.on_leak to drop or keep."
        raise DataError(f"{len(seen)} rows were seen in training, first {pairs[0]}. {advice}")
    left = tuple(row for row in rows if row.source not in sources) if spec.on_leak == "drop" else rows
    if not left:
        raise DataError(f"All {len(rows)} rows were seen in training, so they show nothing. Name a file of other rows.")
    return left, dataclasses.replace(found, pairs=pairs, dropped=seen if spec.on_leak == "drop" else ())

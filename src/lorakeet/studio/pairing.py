"""Two runs on the same rows: paired differences from their reports, and the commands that measure what the reports leave out.

A report lists some of its rows, chosen to be read. Nothing is computed from a choice: only a report with all of its rows counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakeet.config import read_run
from lorakeet.disk import erase
from lorakeet.errors import DataError
from lorakeet.evaluate.compare import Comparison, compare_losses, compare_values
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.report import Report, ScoredAnswer, SideBySide, read_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.studio.deleted import deleted_runs
from lorakeet.studio.forms import run_file
from lorakeet.studio.places import Places

_ALL_ROWS = 10_000_000  # more than any report has
_DIFFERENT = 40  # rows that a page shows

Key = tuple[str, str, int]  # text and truth of a row, and which of several such rows it is


@dataclass(frozen=True)
class PairedRow:
    """One row with the answers of both adapters."""

    text: str
    truth: str
    left: ScoredAnswer
    right: ScoredAnswer


@dataclass(frozen=True)
class PairedRuns:
    """The comparison of two runs on their common rows; `only` are the rows that one of them alone was measured on.

    `older`: a report is of an earlier version, which kept neither tokens nor groups, so each row counts the same.
    """

    comparison: Comparison
    rows: tuple[PairedRow, ...]  # where they differ most
    only: tuple[int, int]
    older: bool = False


def whole_report(places: Places, name: str) -> Report | None:
    """A report of the run `name` with all of its rows: its own, or one that was measured for comparisons; None without one.

    A report that is older than the adapter's weights is of other weights, and does not count.
    """
    measured, own = measured_folder(places, name) / "report.json", places.run(name) / "report.json"
    for path in (measured, own):
        if path.is_file() and (path == measured or path.stat().st_mtime_ns >= _weights_changed(places, name)):
            report = read_report(path)
            if report.rows and len(report.rows) == report.rows_of:
                return report
    return None


def was_measured(places: Places, name: str) -> bool:
    """True if the run was measured for comparisons, with its present weights."""
    return (measured_folder(places, name) / "report.json").is_file()


def measured_folder(places: Places, name: str) -> Path:
    """Where a run is measured on all rows; another one for another adapter of the same name."""
    return places.own / "measured" / f"{name}-{_weights_changed(places, name):x}"


def forget_measured(places: Places) -> None:
    """Removes what was measured of runs that are neither there nor in the bin any more."""
    kept = {one.name for one in deleted_runs(places)}
    for folder in (places.own / "measured").glob("*-*"):
        name = folder.name.rpartition("-")[0]
        if name not in kept and not (places.runs / name).exists():
            erase(folder)


def _weights_changed(places: Places, name: str) -> int:
    """When the adapter's weights were written, in ns since 1970. DataError without an adapter."""
    folder = places.run(name) / "adapter"
    try:
        return max(path.stat().st_mtime_ns for path in [*folder.glob("*.safetensors")] or [folder])
    except OSError:
        raise DataError(f"'{name}' has no adapter yet, so it cannot be compared. Wait until it is done, or resume it.") from None


def measuring(places: Places, name: str) -> tuple[list[str], str]:
    """The words of the command that measures a run on all of its held-out or test rows, and its run file."""
    folder = places.run(name)
    whole = {"show_rows": _ALL_ROWS, "answers": 0, "drift_texts": 0, "examples": 0}
    config = read_run(folder / "config.yaml").changed(evaluate=whole)
    words = ["evaluate", str(folder), "--config", "{folder}/run.yaml", "--out", str(measured_folder(places, name))]
    return words, run_file(config)


def pair_runs(left: tuple[str, Report], right: tuple[str, Report], spec: EvaluateSpec | None = None) -> PairedRuns:
    """`left` − `right`, each a name and its whole report, on the rows that both have. DataError if there are none, or too few.

    Labelled rows and replies are compared by how many are right, all others by their loss in nats per token, over the same tokens
    and with the same groups as in the reports: what a report of both would say.
    """
    spec = spec or EvaluateSpec()
    mine, other = _by_key(left[1].rows), _by_key(right[1].rows)
    common = sorted((key for key in mine if key in other), key=lambda key: mine[key].place or 0)
    only = len(mine) - len(common), len(other) - len(common)
    if not common:
        raise DataError(
            f"'{left[0]}' was measured on {len(mine)} rows and '{right[0]}' on {len(other)}, and none is in both. Train both on "
            "the same rows with the same data.split_seed, or name the same data.test."
        )
    pairs = [(mine[key].adapter, other[key].adapter) for key in common]
    names, rows = (left[0], right[0]), [mine[key] for key in common]
    older = any(row.place is None for row in (*rows, *(other[key] for key in common)))
    groups = tuple(row.group for row in rows) if all(row.group is not None for row in rows) and not older else None
    if all(one.right is not None and two.right is not None for one, two in pairs):
        values = tuple(np.array([float(bool(side.right)) for side in sides]) for sides in zip(*pairs, strict=True))
        comparison = compare_values(names, "accuracy", (values[0], values[1]), spec, groups=groups)
        gaps = values[0] - values[1]
    else:
        losses = [[side.loss for side in sides] for sides in zip(*pairs, strict=True)]
        if any(loss is None for side in losses for loss in side):
            raise DataError(f"'{left[0]}' and '{right[0]}' were measured in different ways. Measure both again.")
        counts = [1 if older else row.tokens or 1 for row in rows]
        if not older and counts != [other[key].tokens or 1 for key in common]:
            raise DataError(
                f"'{left[0]}' and '{right[0]}' read the same rows as different tokens. Compare runs of one tokenizer."
            )
        tokens = np.array(counts, dtype=np.int64)
        each = [np.array(side, dtype=np.float64) for side in losses]
        one, two = (RowLosses(name, mean * tokens, tokens, groups) for name, mean in zip(names, each, strict=True))
        comparison, gaps = compare_losses(one, two, spec), each[0] - each[1]
    order = sorted((index for index in range(len(common)) if gaps[index]), key=lambda index: -abs(gaps[index]))[:_DIFFERENT]
    shown = tuple(PairedRow(*common[index][:2], *pairs[index]) for index in order)
    return PairedRuns(comparison, shown, only, older)


def _by_key(rows: Sequence[SideBySide]) -> dict[Key, SideBySide]:
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for row in rows:
        found[(row.text, row.truth, seen[(row.text, row.truth)])] = row
        seen[(row.text, row.truth)] += 1
    return found

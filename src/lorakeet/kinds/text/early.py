"""What a run on text can be refused for before torch is imported: missing rows, wrong columns, a missing model."""

from __future__ import annotations

from pathlib import Path

from lorakeet.config import RunConfig
from lorakeet.data.locate import locate_model
from lorakeet.data.read import check_first_record, read_rows

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_SMALL = 1 << 20  # bytes, which take a tenth of a second


def require_text_rows(config: RunConfig, *, whole: bool) -> None:
    """Raises DataError for files of rows that are missing, or whose columns are not known.

    `whole`: also for single rows of a file that is read in less time than torch is imported.
    """
    data = config.data
    for name in filter(None, (data.train, data.test, data.held_out)):
        check_first_record(name, data, config.train.registered)
        if whole and _is_small(Path(name).expanduser()):
            read_rows(name, data, None, config.train.registered)


def require_text_base(config: RunConfig) -> None:
    """Raises DataError or EnvironmentProblem for a model that is named by a path and is not there."""
    locate_model(config.model.path)


def _is_small(path: Path) -> bool:
    return path.suffix.lower() in _PLAIN and path.is_file() and path.stat().st_size <= _SMALL

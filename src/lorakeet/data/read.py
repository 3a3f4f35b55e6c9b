"""Reads rows by name: from a file, a `datasets` folder or the hub (extras [parquet] and [hub]); gives every record its shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lorakeet.data.locate import PACKAGE, WORKBOOKS, locate_data, quiet_hub
from lorakeet.data.parquet import parquet_records
from lorakeet.data.proposals.columns import (
    SAMPLED,
    doubtful_label_note,
    overlooked_label,
    overlooked_label_note,
    undecided_labels,
)
from lorakeet.data.proposals.reading_on import every_problem
from lorakeet.data.rows import Row
from lorakeet.data.shapes import added_shapes, shape_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import with_prompt_groups
from lorakeet.data.tables import READERS, SHOWN_PROBLEMS, FileRecord, RowProblems, TextFormat, given_name, text_records
from lorakeet.data.workbook import sheets_note, workbook_records
from lorakeet.errors import DataError, EnvironmentProblem, PackageMissing, Remedy, nearest
from lorakeet.registry import ANY, Objective

HUB = "hub:"
SAID_EACH = 20_000  # rows
_READ_ON = 100_000  # rows that are read for the other problems of a file
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|xls[xm]|zip|gz)$", re.IGNORECASE)


def read_rows(
    name: str,
    spec: DataSpec,
    notes: list[str] | None = None,
    registered: Objective = ANY,
    proposed: list[Remedy] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Reads the rows of one file, folder or hub data set, at most `spec.limit` of them, as what is trained takes them.

    Answers that are compared on one prompt are a group.

    Raises one DataError that lists all problems of single rows, and of the file (`every_problem`). With data.bad_rows "drop" such
    rows are left out; a sentence about them is added to `notes`. So is one about a column of labels or verdicts that is not read,
    and about a prompt that is guessed; the setting of labels is added to `proposed`. `say` is given their number meanwhile.
    """
    first: list[FileRecord] = []
    with all_problems(name, spec, registered):
        rows = _read(name, spec, notes, registered, first=first, say=say)
    words, values = given_name(name), [each.values for each in first]
    if notes is not None and (several := sheets_note(name)):
        notes.append(several)
    if notes is not None:
        notes += filter(None, (shape.note(words, rows[0], values, registered) for shape in added_shapes().values()))
    plain = not rows[0].turns[0].role and spec.label_column is None and spec.format == "auto"
    if plain and notes is not None:
        used = {spec.text_column, spec.group_column or ""}
        if label := overlooked_label(first, used):
            notes.append(overlooked_label_note(words, first, spec.text_column, label))
            if proposed is not None:
                proposed.append(label)
        elif undecided := undecided_labels(first, used):
            doubt = doubtful_label_note(first, undecided)
            notes.append(f"{words} is read as plain text, column {spec.text_column!r}. {doubt}")
    return rows


@contextmanager
def all_problems(name: str, spec: DataSpec, registered: Objective = ANY) -> Iterator[None]:
    """A context in which the DataError of reading a file becomes one of all its problems (`every_problem`)."""
    try:
        yield
    except DataError as error:
        if not error.remedies or not _opens_again(name):
            raise
        most = min(spec.limit or _READ_ON, _READ_ON)

        def read(other: DataSpec) -> object:
            return _read(name, replace(other, limit=most), None, registered, shown=3)

        raise every_problem(error, given_name(name), spec, read) from error


def _read(
    name: str,
    spec: DataSpec,
    dropped: list[str] | None,
    registered: Objective,
    *,
    shown: int = SHOWN_PROBLEMS,
    first: list[FileRecord] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    words = given_name(name)
    problems = RowProblems(f"{words} cannot be used as it is", shown)
    records = _first_kept(islice(read_records(name, problems, spec), spec.limit), first, say)
    rows = list(shape_rows(records, words, spec, problems, registered))
    if spec.bad_rows == "stop" or not rows:
        problems.raise_if_any()
    if not rows:
        raise DataError(f"{words} has no rows; expected at least one record below the header.")
    if problems.count and dropped is not None:
        count, total = problems.count, problems.count + len(rows)
        what = "row was" if count == 1 else "rows were"
        dropped.append(f"{count:,} {what} dropped of the {total:,} of {words}; first {problems.first}")
    return with_prompt_groups(rows)


def _first_kept(
    records: Iterator[FileRecord], kept: list[FileRecord] | None, say: Callable[[str], None] | None
) -> Iterator[FileRecord]:
    """The records; the first of them are added to `kept`, and `say` is given their number from time to time."""
    for number, record in enumerate(records):
        if say is not None and number and number % SAID_EACH == 0:
            say(f"Reads all rows, {number:,} so far")
        if kept is not None and len(kept) < SAMPLED:
            kept.append(record)
        yield record


def check_first_record(name: str, spec: DataSpec, registered: Objective = ANY) -> None:
    """Raises what `read_rows` would for a missing file, an unknown extension or a missing column; reads one record of the file,
    and where that is wrong more, for its other problems.

    Says nothing of data sets that the datasets library reads, nor of a named pipe, which can be read only once.
    """
    if not _opens_again(name):
        return
    problems = RowProblems(name)  # of single rows: all are named once the whole file is read
    with all_problems(name, spec, registered):
        next(shape_rows(read_records(name, problems, spec), given_name(name), spec, problems, registered), None)


def _opens_again(name: str) -> bool:
    """Whether `name` is a file that Lorakeet itself reads, and can read once more."""
    path, folder = Path(name).expanduser(), Path(name.partition("#")[0]).expanduser()
    on_hub = not name.startswith(PACKAGE) and not path.exists() and is_hub_id(name)
    return not (on_hub or folder.is_dir() or path.is_fifo())


def is_absent(name: str) -> bool:
    """Whether `name` is a path at which this machine has nothing, and no id of a data set either."""
    if name.startswith(PACKAGE) or is_hub_id(name):
        return False
    archive, mark, _ = name.partition(".zip!")
    places = (name, name.partition("#")[0], f"{archive}.zip" if mark else name)
    return not any(Path(place).expanduser().exists() for place in places)


def read_records(name: str, problems: RowProblems, spec: DataSpec | None = None) -> Iterator[FileRecord]:
    """Yields the records of one file, folder or hub data set, in order and unchanged."""
    base, mark, split = name.partition("#")
    if mark and Path(base).expanduser().is_dir():
        return folder_records(Path(base).expanduser(), split)
    if not name.startswith(PACKAGE) and not Path(name).expanduser().exists() and is_hub_id(name):
        return hub_records(name)
    location = locate_data(name)
    if location.path.is_dir():
        return folder_records(location.path, "")
    spec = spec or DataSpec()
    most = spec.largest_unpacked << 20
    if location.kind == ".parquet":
        return parquet_records(location, problems, most, 8 * spec.longest_row)
    if location.kind in WORKBOOKS:
        return workbook_records(location, problems, most, 8 * spec.longest_row)
    if location.kind in READERS:
        text = TextFormat(spec.encoding, spec.separator_of_columns, 8 * spec.longest_row, most)
        return text_records(location, problems, text)
    known = [*READERS, ".parquet", *WORKBOOKS]
    raise DataError(
        f"{name} ends in '{location.kind}', which has no reader; expected one of {', '.join(known)} "
        f"(text files also with .gz).{nearest(location.kind, known)}"
    )


def is_hub_id(name: str) -> bool:
    """True for a data set on the hub: "hub:owner/name", or "owner/name" where no such path exists."""
    bare = name.partition("#")[0]
    if name.startswith(HUB):
        return True
    return bool(_HUB_ID.fullmatch(bare)) and not _FILE.search(bare) and not Path(bare.partition("/")[0]).exists()


def hub_records(name: str) -> Iterator[FileRecord]:
    """Yields the rows of a hub data set "owner/name#split" (default split: "train")."""
    identity, _, split = name.removeprefix(HUB).partition("#")
    datasets = _datasets(name)
    try:
        with quiet_hub():
            loaded = datasets.load_dataset(identity, split=split or "train")
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"The data set '{identity}' (split '{split or 'train'}') could not be loaded from the hub: {error}. "
            "Check the name and the connection, or give a local file."
        ) from error
    yield from dataset_records(loaded, identity)


def folder_records(path: Path, split: str) -> Iterator[FileRecord]:
    """Yields the rows of a folder written by `save_to_disk`; `split` picks one of several."""
    if not any((path / marker).exists() for marker in SAVED):
        raise DataError(
            f"'{path}' is a folder without a saved data set; name a file in it, or a folder written by datasets' save_to_disk."
        )
    datasets = _datasets(str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"'{path}' cannot be read as a saved data set ({error}); save it again with save_to_disk.") from error
    if isinstance(loaded, dict):
        names = list(loaded)
        if not split and len(names) == 1:
            split = names[0]
        if split not in loaded:
            wanted = f"has no split '{split}'" if split else "holds several splits"
            raise DataError(f"'{path}' {wanted}; write '{path}#SPLIT' with one of: {', '.join(names)}.{nearest(split, names)}")
        loaded = loaded[split]
    yield from dataset_records(loaded, path.name)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise PackageMissing(f"'{name}' is read with the datasets library", "lorakeet[hub]") from error
    return datasets


def dataset_records(loaded: Any, name: str) -> Iterator[FileRecord]:
    """Yields the rows of a datasets.Dataset. A ClassLabel column stores numbers; its names are taken."""
    named = {column: feature for column, feature in loaded.features.items() if hasattr(feature, "int2str")}
    for number, values in enumerate(loaded, start=1):
        for column, feature in named.items():
            if isinstance(values[column], int) and values[column] >= 0:
                values[column] = feature.int2str(values[column])
        yield FileRecord(f"{name}:{number}", values)

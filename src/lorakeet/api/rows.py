"""Rows as a Python value: a file by name, or records in memory, with how they are formatted and split."""

from __future__ import annotations

import dataclasses
import hashlib
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

from lorakeet.api.arguments import given_as, in_python, python_call
from lorakeet.api.records import jsonl_of, row_names
from lorakeet.data.prepare import Dataset, load_dataset
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import IN_MEMORY, InMemory
from lorakeet.disk import write_whole
from lorakeet.errors import ConfigError, spelling
from lorakeet.registry import ANY
from lorakeet.settings import load as load_settings

_SHOWN, _SHOWN_TEXT = 5, 120  # rows, and characters of each, in a notebook
_FILES = ("train", "held_out", "test")
_ARGUMENTS = {"train": "source"}  # of `rows`, where it is called otherwise


@python_call(in_python)
def rows(source: Any, *, held_out: Any = None, test: Any = None, **settings: Any) -> RowSet:
    """The rows of a run.

    `source`: a path, 'package:DIST/path', 'hub:owner/name#split', or records: dicts, a pandas.DataFrame, a pyarrow.Table or a
    datasets.Dataset. `held_out`: the share to hold out, such as 0.1, or held-out rows like `source`. `test`: rows that choose
    nothing. `settings`: other fields of DataSpec, such as `template`. Records are kept in a file until the process ends.

    Raises ConfigError for a wrong setting, DataError for records that are no rows.

    Examples:
        >>> import lorakeet as lk
        >>> cities = ("Oslo", "Lima", "Rome", "Bern")
        >>> records = [{"prompt": city, "completion": f" {number}"} for number, city in enumerate(cities)]
        >>> rows = lk.rows(records, held_out=0.5)
        >>> len(rows.train), len(rows.held_out), rows.train[0].turns[0].role
        (2, 2, 'user')
    """
    kept: dict[str, tuple[str, ...]] = {}
    mapping: dict[str, Any] = dict(settings)
    for name in _FILES:
        if name in settings:
            raise ConfigError(f"lk.rows takes {name} as an argument of its own, not as a setting. Leave {name}= out.")
    if isinstance(held_out, (int, float)) and not isinstance(held_out, bool):
        mapping["held_out_fraction"], held_out = held_out, None
    for name, given in zip(_FILES, (source, held_out, test), strict=True):
        if isinstance(given, (str, Path)):
            mapping[name] = str(given)
        elif given is not None:
            path, count = stored(given, name)
            mapping[name], kept[name] = str(path), row_names(given, _ARGUMENTS.get(name, name), count)
    return RowSet(load_settings(DataSpec, mapping, where="lk.rows"), kept)


@cache
def _folder() -> TemporaryDirectory[str]:
    """The folder of records that were given in memory; it goes with the process."""
    return TemporaryDirectory(prefix="lorakeet-rows-")


def stored(records: Any, name: str) -> tuple[Path, int]:
    """A file with the records, named by its content, and their number."""
    if not isinstance(records, Iterable):
        raise ConfigError(f"The {name} rows are {given_as(records)}; expected a path, dicts, a DataFrame, a Table or a Dataset.")
    text = jsonl_of(records)
    path = Path(_folder().name) / f"{hashlib.sha256(text).hexdigest()[:24]}.jsonl"
    if not path.is_file():
        write_whole(path, text)
    return path, text.count(b"\n")


@contextmanager
def naming_rows(known: Mapping[str, InMemory]) -> Iterator[None]:
    """A context in whose messages `known` rows are named by their index or number."""
    before = IN_MEMORY.set(known)
    try:
        yield
    finally:
        IN_MEMORY.reset(before)


@dataclass(frozen=True)
class RowPart(Sequence[Row]):
    """The rows of one part, with the settings and labels that they were read with."""

    rows: tuple[Row, ...]
    spec: DataSpec
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> RowPart: ...
    def __getitem__(self, number: int | slice) -> Row | RowPart:
        if isinstance(number, slice):
            return RowPart(self.rows[number], self.spec, self.labels)
        return self.rows[number]


@dataclass(frozen=True, repr=False)
class RowSet:
    """Rows with their settings; read, split and checked for leaks at the first use of `train`, `held_out` or `test`."""

    spec: DataSpec
    in_memory: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names of rows, by the setting of their file

    @cached_property
    def dataset(self) -> Dataset:
        """All parts, with labels and leaks. Raises ConfigError or DataError, as a run would."""
        with self.naming_rows(), spelling(in_python):
            return load_dataset(self.spec, ANY)

    def naming_rows(self, spec: DataSpec | None = None) -> AbstractContextManager[None]:
        """`naming_rows` for these rows; `spec`: the settings of a run with them (`beside`)."""
        return naming_rows({
            getattr(spec or self.spec, name): InMemory(_ARGUMENTS.get(name, name), rows)
            for name, rows in self.in_memory.items()
        })  # fmt: skip

    @property
    def train(self) -> RowPart:
        """The rows that are trained on."""
        return RowPart(self.dataset.train, self.spec, self.labels)

    @property
    def held_out(self) -> RowPart:
        """The rows that choose the checkpoint, and are never trained on."""
        return RowPart(self.dataset.held_out, self.spec, self.labels)

    @property
    def test(self) -> RowPart:
        """The rows that choose nothing."""
        return RowPart(self.dataset.test, self.spec, self.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in reporting order; empty if rows have none."""
        return self.dataset.labels

    def beside(self, out: str) -> DataSpec:
        """The settings for a run in the folder `out`: what was in memory is a file beside it, so that the run can be run again.

        Raises ConfigError, and writes nothing, where the file of another run has that place.
        """
        places = {name: Path(f"{Path(out)}-{name.replace('_', '-')}-rows.jsonl") for name in self.in_memory}
        contents = {name: Path(getattr(self.spec, name)).read_bytes() for name in places}
        for name, path in places.items():
            if path.exists() and path.read_bytes() != contents[name] and Path(out).exists():
                raise ConfigError(f"{path} has other rows than this run. Remove it, or choose another out.")
        for name, path in places.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, contents[name])
        return dataclasses.replace(self.spec, **{name: str(path) for name, path in places.items()})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        named = {name: getattr(self.spec, name) for name in _FILES if getattr(self.spec, name)}
        said = ", ".join(f"{name}={value!r:.60}" for name, value in (named | dict.fromkeys(self.in_memory, "in memory")).items())
        return f"Rows({said})"

    def __str__(self) -> str:
        data = self.dataset
        labels = f"; labels {', '.join(f'{label} {count}' for label, count in data.label_counts.items())}" if data.labels else ""
        left_out = f"; {len(data.leaks.dropped)} training rows left out as copies" if data.leaks.dropped else ""
        return f"{len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test rows{labels}{left_out}"

    def _repr_html_(self) -> str:
        """The counts and the first training rows, as a table."""
        lines = [f"<p>{html.escape(str(self))}</p><table><tr><th>prompt</th><th>answer</th></tr>"]
        for row in self.train[:_SHOWN]:
            prompt = " ".join(turn.text for turn in row.turns if not turn.supervised)
            answer = " ".join(turn.text for turn in row.turns if turn.supervised)
            lines.append(f"<tr><td>{_cut(prompt)}</td><td>{_cut(answer)}</td></tr>")
        return "".join([*lines, "</table>"])


def _cut(text: str) -> str:
    return html.escape(text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}…")

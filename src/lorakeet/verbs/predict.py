"""`lorakeet predict`: answers the rows of a file with a run or an adapter, and writes the file with the answers beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.data.chat import Encoder
from lorakeet.data.predicted.contents import require_rereadable
from lorakeet.data.predicted.unlabelled import row_shaper
from lorakeet.data.predicted.written_records import (
    record_writer,
    require_written_format,
)
from lorakeet.data.read import read_records
from lorakeet.data.tables import LEAVE_OUT, RowProblems, given_name
from lorakeet.data.template import uses_template
from lorakeet.disk import written_whole
from lorakeet.errors import SPELLING, ConfigError, DataError, Remedy, spelling, spelt
from lorakeet.formats.identity import Uncertified
from lorakeet.kinds.text.answerer import Answerer, RightShare, ends_with_line
from lorakeet.kinds.text.evaluate import require_encodable
from lorakeet.kinds.text.reply import LINE
from lorakeet.planning.encoded_rows import within_context
from lorakeet.planning.evaluation import model_to_measure
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.replying.rows_file import RowsFile, read_rows_file
from lorakeet.runs.open_adapter import Opened, open_by_options
from lorakeet.runs.output_paths import require_new_place, writing
from lorakeet.runs.trained_prompt import trained_labels
from lorakeet.train.progress import counted
from lorakeet.verbs.options import PredictOptions

TOGETHER = 2048  # rows that are in memory at once
OWN_FLAGS = ("encoding", "delimiter", "text_column")  # settings of data that are options here


@dataclass(frozen=True)
class Predicted:
    """What was written: rows in all, those with an answer, those marked for review, those shortened, and the new columns."""

    out: Path
    rows: int
    answered: int
    review: int
    shortened: int
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()
    summary: str = ""  # what was counted, in a sentence

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**dataclasses.asdict(self), "out": str(self.out), "columns": list(self.columns), "notes": list(self.notes)}


def predict(options: PredictOptions, *, console: Console) -> Predicted:
    """Answers each row of `options.data` and writes all of them, in order, with new columns, to the new file `options.out`.

    Rows of a run with labels get the likeliest one, its probability as the report measures it, the distance to the next, and a
    mark for review; prompts get the greedy answer. A row without text gets no answer. Raises ConfigError and DataError before
    the model is loaded.
    """
    require_new_place(options.out)
    require_written_format(options.out)
    require_rereadable(options.data)
    if not 0 <= options.review <= 1:
        raise ConfigError(f"{spelt('review')} is {options.review}; expected a probability from 0 to 1, such as 0.8.")
    say = partial(console.print, markup=False, soft_wrap=True)
    opened = open_by_options(options.run_or_adapter, options, console, config=options.config)
    require_encodable(opened.config)
    labels = trained_labels(opened.run, opened.config.data)
    with spelling(_own_spelling()):
        file = _read_first(options, opened, labels)
    one_line, unknown = (False, "") if labels else ends_with_line(opened)
    for note in file.notes:
        say(note)
    with model_to_measure(opened, console, Workload(bool(labels), file.characters)) as (text, _):
        settings = within_context(dataclasses.replace(opened.config, data=file.spec), text.name, text.context, say)
        encoder = Encoder(text.tokenizer, settings.data, labels)
        plain = not labels and not uses_template(text.tokenizer, settings.data)
        later = [unknown] if plain and unknown else []
        measured = RightShare.of(opened)
        answerer = Answerer(
            settings, text, encoder, console, LINE if plain and one_line else "", measured, options.review, options.max_tokens
        )
        with writing(str(options.out), "Free some space, or choose another --out."):
            found = _written(options, file, answerer)
    later += found.notes
    for note in later:
        say(note)
    shortened = f", {found.shortened:,} shortened to {settings.data.max_tokens:,} tokens" if found.shortened else ""
    marked = f"{found.review:,} marked for review{measured.said}"
    marked += "".join(f"; the adapter is {said}" for said in file.constant.values())
    summary = f"{found.answered:,} of {found.rows:,} rows answered{shortened}; {marked}"
    say(f"{summary}: {options.out}")
    return dataclasses.replace(found, notes=(*filter(None, (opened.note,)), *file.notes, *later), summary=summary)


def _read_first(options: PredictOptions, opened: Opened, labels: Sequence[str]) -> RowsFile:
    """Reads the whole file as the run read its rows, but for what the options say; remedies are options too."""
    given: dict[str, Any] = {name: value for name in OWN_FLAGS if (value := getattr(options, name)) is not None}
    spec = dataclasses.replace(opened.config.data, limit=None, **given)
    spec = dataclasses.replace(spec, train=options.data, held_out=None, test=None)
    spec.validate()
    said = opened.note if isinstance(opened.note, Uncertified) else ""
    try:
        return read_rows_file(spec, options.out, options.column, labels, said)
    except DataError as error:
        error.remedies = tuple(_own_remedies(error.remedies))
        raise


def _own_spelling() -> Callable[[str, str | None], str]:
    """How messages name settings of data: as options of this verb. Rows are never left out, so that setting has no words."""
    spell = SPELLING.get()

    def own(setting: str, value: str | None) -> str:
        name = setting.removeprefix("data.")
        if setting == LEAVE_OUT.setting:
            return ""
        if name in OWN_FLAGS or "." not in setting:
            return spell(name.replace("_", "-"), value)
        return f"{setting}{'' if value is None else f' {value}'} in a file for {spell('config', None)}"

    return own


def _own_remedies(remedies: Iterable[Remedy]) -> Iterator[Remedy]:
    """The remedies that are options of this verb, by their names here."""
    for one in remedies:
        if (name := one.setting.removeprefix("data.")) in OWN_FLAGS:
            yield dataclasses.replace(one, setting=name.replace("_", "-"))


def _written(options: PredictOptions, file: RowsFile, answerer: Answerer) -> Predicted:
    """Reads the rows once more, and writes each with its answer."""
    counts = {"rows": 0, "answered": 0, "review": 0, "shortened": 0, "replaced": 0}
    known = {*file.own}
    own = [name for name in file.columns if name not in file.constant]
    ignored = RowProblems(options.data)  # all are known since the first reading
    shaped = row_shaper(given_name(options.data), file.spec, answerer.encoder.labels, ignored)
    with (
        written_whole(options.out) as made,
        record_writer(made, file.form, (*file.own, *file.columns)) as write,
        counted(answerer.console, "answers rows", file.rows) as advance,
    ):
        following = read_records(options.data, ignored, file.spec)
        while records := list(islice(following, TOGETHER)):
            answers = answerer.answers([shaped(record) for record in records])
            for record, answer in zip(records, answers, strict=True):
                if new := record.values.keys() - known:
                    raise DataError(f"{options.data} changed while it was answered: column {min(new)!r} is new. Try again.")
                counts["replaced"] += not write({**record.values, **answer.cells(own), **file.constant})
                counts["answered"] += bool(answer.text)
                counts["review"] += answer.review
                counts["shortened"] += answer.shortened
            counts["rows"] += len(records)
            advance(len(records))
        if counts["rows"] != file.rows:
            changed = f"{counts['rows']:,} rows, before {file.rows:,}"
            raise DataError(f"{options.data} changed while it was answered: {changed}. Try again.")
    said = f"{counts['replaced']:,} rows have characters that {file.form.encoding} cannot write; '?' stands for each."
    rows, answered, review, shortened = (counts[name] for name in ("rows", "answered", "review", "shortened"))
    notes = (said,) if counts["replaced"] else ()
    return Predicted(options.out, rows, answered, review, shortened, columns=file.columns, notes=notes)


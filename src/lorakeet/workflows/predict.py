"""`lorakeet predict`: answers the rows of a file with a run or an adapter, and writes the file with the answers beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Candidates, Encoder, Ids
from lorakeet.data.predicted.unlabelled import fitting_columns, row_shaper
from lorakeet.data.predicted.written_records import TableForm, form_like, record_writer, require_written_format
from lorakeet.data.read import read_records
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import read_split_record
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.disk import written_whole
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.evaluate.likelihood import label_log_probs
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.models.generate.score import label_scores
from lorakeet.models.inject import activate
from lorakeet.models.text.model import TextModel
from lorakeet.train.progress import counted
from lorakeet.workflows.finetuning.evaluate_text import require_encodable
from lorakeet.workflows.finetuning.reply import ADAPTER, LINE, Prompts, Replier
from lorakeet.workflows.options import PredictOptions
from lorakeet.workflows.planning.encoded_rows import within_context
from lorakeet.workflows.planning.evaluation import fit_evaluation
from lorakeet.workflows.planning.forecast_text_run import Workload
from lorakeet.workflows.runs.open_adapter import NAME, Opened, open_adapter
from lorakeet.workflows.runs.output_paths import require_absent, require_place, writing
from lorakeet.workflows.runs.residency import peak_said

TOGETHER = 2048  # rows that are in memory at once
_SAMPLED = 100  # records from which columns are proposed
_DIGITS = 6  # of a probability
ANSWER = "answer"
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

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**dataclasses.asdict(self), "out": str(self.out), "columns": list(self.columns), "notes": list(self.notes)}


@dataclass(frozen=True)
class _Answer:
    """An answer to a row, empty for none; labels have a probability and its distance to the next one."""

    text: str = ""
    probability: float | None = None
    margin: float | None = None
    shortened: bool = False
    review: bool = True

    def cells(self, columns: Sequence[str]) -> dict[str, object]:
        numbers = [None if value is None else round(value, _DIGITS) for value in (self.probability, self.margin)]
        every = [self.text, *numbers, "yes" if self.review else ""]
        return dict(zip(columns, every if len(columns) == len(every) else [every[0], every[-1]], strict=True))


def predict(options: PredictOptions, *, console: Console) -> Predicted:
    """Answers each row of `options.data` and writes all of them, in order, with new columns, to the new file `options.out`.

    Rows of a run with labels get the likeliest one, its probability as the report measures it, the distance to the next, and a
    mark for review; prompts get the greedy answer. A row without text gets no answer. Raises ConfigError and DataError before
    the model is loaded.
    """
    require_absent(options.out)
    require_place(options.out)
    require_written_format(options.out)
    if not 0 <= options.review <= 1:
        raise ConfigError(f"--review is {options.review}; expected a probability from 0 to 1, such as 0.8.")
    say = partial(console.print, markup=False, soft_wrap=True)
    path = Path(options.run_or_adapter)
    opened = open_adapter(path, base=options.base, config=options.config, say=console.print).within(options.memory)
    require_encodable(opened.config)
    labels = _labels(opened)
    file = _read_first(options, opened.config.data, labels)
    form = form_like(options.data, file.spec, options.out, labels or None)
    notes = [*file.notes, *([form.said] if form.said else [])]
    for note in notes:
        say(note)
    residency = fit_evaluation(opened.config, opened.adapter, say, Workload(bool(labels), file.characters))
    with enforcing_gpu_budget(residency.budget, "Raise it with --memory."), peak_said(residency, console):
        text = dataclasses.replace(opened, residency=residency).text_model(console)
        settings = within_context(dataclasses.replace(opened.config, data=file.spec), text.name, text.context, say)
        encoder = Encoder(text.tokenizer, settings.data, labels)
        answerer = _Answerer(settings, text, encoder, console, options, "" if labels else _ending(opened, text, encoder))
        with writing(str(options.out), "Free some space, or choose another --out."):
            found = _written(options, file, form, answerer)
    found = dataclasses.replace(found, notes=tuple(notes))
    shortened = f", {found.shortened:,} shortened to {settings.data.max_tokens:,} tokens" if found.shortened else ""
    say(f"{found.answered:,} of {found.rows:,} rows answered{shortened}; {found.review:,} marked for review: {options.out}")
    return found


def _labels(opened: Opened) -> tuple[str, ...]:
    """The labels of the run, in the order of its report; of a bare adapter those of its settings."""
    if opened.run is not None and opened.run.split.is_file():
        known = read_split_record(opened.run.split).get("labels")
        return tuple(map(str, known)) if isinstance(known, list) else ()
    return opened.config.data.labels


@dataclass(frozen=True)
class _RowsFile:
    """A file that was read once: how it is read, the columns that are added, its rows and characters, and what to say of it."""

    spec: DataSpec
    columns: tuple[str, ...]
    rows: int
    characters: int
    notes: tuple[str, ...]


def _read_first(options: PredictOptions, trained: DataSpec, labels: Sequence[str]) -> _RowsFile:
    """Reads the whole file, so that what is wrong with it is known before the model is loaded."""
    given: dict[str, Any] = {name: getattr(options, name) for name in OWN_FLAGS}
    spec = dataclasses.replace(trained, limit=None, **{key: value for key, value in given.items() if value is not None})
    spec = dataclasses.replace(spec, train=options.data, held_out=None, test=None)
    spec.validate()
    lines, empty = RowProblems(f"{options.data} cannot be used as it is"), RowProblems(options.data)
    try:
        first = list(islice(read_records(options.data, lines, spec), _SAMPLED))
        if not first and not lines.count:
            raise DataError(f"{options.data} has no rows; expected at least one record below the header.")
        notes = []
        if first:
            spec, taken = fitting_columns(first, options.data, spec, labels)
            notes += [taken] if taken else []
        lines = RowProblems(f"{options.data} cannot be used as it is")
        shaped = row_shaper(options.data, spec, labels, empty)
        rows = characters = 0
        for record in read_records(options.data, lines, spec):
            rows, row = rows + 1, shaped(record)
            characters += 0 if row is None else len(row.text)
        lines.raise_if_any()
    except DataError as error:
        raise DataError(_with_own_flags(str(error)), remedies=error.remedies) from error
    if empty.count == rows:
        raise DataError(f"No row of {options.data} can be answered; first {empty.first}")
    if empty.count:
        notes.append(f"{empty.count:,} of {rows:,} rows get no answer; first {empty.first}")
    return _RowsFile(spec, _new_columns(options, trained, first[0], labels), rows, characters, tuple(notes))


def _with_own_flags(message: str) -> str:
    """The message with the flags of this verb, and without the advice to leave rows out, since all rows are written."""
    for name in OWN_FLAGS:
        message = message.replace(f"--data.{name}", f"--{name.replace('_', '-')}")
    return message.replace(" To leave such rows out, set --data.bad_rows drop.", "").replace(
        "\nTo leave such rows out, set --data.bad_rows drop.", ""
    )


def _new_columns(options: PredictOptions, trained: DataSpec, first: FileRecord, labels: Sequence[str]) -> tuple[str, ...]:
    """The names of the added columns; ConfigError if the file has one of them."""
    own = (trained.label_column or "label") if labels else ANSWER
    name = options.column or (f"{own}_predicted" if own in first.values else own)
    columns = (name, f"{name}_probability", f"{name}_margin", f"{name}_review") if labels else (name, f"{name}_review")
    if taken := [column for column in columns if column in first.values]:
        raise ConfigError(f"{options.data} has a column {taken[0]!r} already. Choose another name with --column.")
    return columns


def _ending(opened: Opened, text: TextModel, encoder: Encoder) -> str:
    """Where replies end, as in the report: with their first line if no template ends them and all training answers have one."""
    try:
        known = [row for row in opened.dataset.train if row.answered] if opened.config.data.train else []
    except (DataError, EnvironmentProblem):
        return ""
    found = Replier(opened.config, text, encoder, Console(quiet=True), NAME).prompts(known[:1], known) if known else None
    return LINE if found is not None and found.ending == LINE else ""


def _written(options: PredictOptions, file: _RowsFile, form: TableForm, answerer: _Answerer) -> Predicted:
    """Reads the rows once more, and writes each with its answer."""
    counts = {"rows": 0, "answered": 0, "review": 0, "shortened": 0}
    ignored = RowProblems(options.data)  # all are known since the first reading
    shaped = row_shaper(options.data, file.spec, answerer.encoder.labels, ignored)
    with (
        written_whole(options.out) as made,
        record_writer(made, form) as write,
        counted(answerer.console, "answers rows", file.rows) as advance,
    ):
        following = read_records(options.data, ignored, file.spec)
        while records := list(islice(following, TOGETHER)):
            answers = answerer.answers([shaped(record) for record in records])
            for record, answer in zip(records, answers, strict=True):
                write({**record.values, **answer.cells(file.columns)})
                counts["answered"] += bool(answer.text)
                counts["review"] += answer.review
                counts["shortened"] += answer.shortened
            counts["rows"] += len(records)
            advance(len(records))
        if counts["rows"] != file.rows:
            changed = f"{counts['rows']:,} rows, before {file.rows:,}"
            raise DataError(f"{options.data} changed while it was answered: {changed}. Try again.")
    return Predicted(options.out, counts["rows"], counts["answered"], counts["review"], counts["shortened"], file.columns)


@dataclass(frozen=True)
class _Answerer:
    """The model with its adapter, and how it answers."""

    config: RunConfig
    text: TextModel
    encoder: Encoder
    console: Console
    options: PredictOptions
    ending: str

    def answers(self, rows: Sequence[Row | None]) -> list[_Answer]:
        """The answer to each row, in order; an empty one where there is no row, or it is left out as too long."""
        places = [place for place, row in enumerate(rows) if row is not None]
        given = [row for row in rows if row is not None]
        found = self._labelled(given) if self.encoder.labels else self._replied(given)
        every = [_Answer()] * len(rows)
        for place, answer in zip(places, found, strict=True):
            every[place] = answer
        return every

    def _labelled(self, rows: Sequence[Row]) -> Iterator[_Answer]:
        """The likeliest label of each row: log p of every label by the scoring of `evaluate`."""
        encoded = [self.encoder.candidates(row) for row in rows]
        kept: list[Candidates] = [one for one in encoded if one is not None]
        activate(self.text.model, NAME)
        scores = label_scores(self.text, kept, micro_tokens=self.config.train.micro_tokens)
        probabilities = np.exp(label_log_probs(scores)) if kept else scores
        following = iter(probabilities)
        for one in encoded:
            if one is None:
                yield _Answer()
                continue
            row = next(following)
            best, second = (float(value) for value in np.sort(row)[::-1][:2])
            doubtful = best < self.options.review or one.truncated
            yield _Answer(self.encoder.labels[int(row.argmax())], best, best - second, one.truncated, doubtful)

    def _replied(self, rows: Sequence[Row]) -> Iterator[_Answer]:
        """The greedy reply to each prompt, by the writing of `evaluate`."""
        limit, context = self.options.max_tokens, self.text.context
        encoded = [self.encoder.question(row) for row in rows]
        questions: dict[int, Ids] = {
            place: pair[0]
            for place, pair in enumerate(encoded)
            if pair is not None and len(pair[0]) and (context is None or len(pair[0]) + limit <= context)
        }
        replies: dict[int, tuple[str, bool]] = {}
        if questions:
            prompted = tuple(rows[place] for place in questions)
            blank = ("",) * len(questions)
            prompts = Prompts(prompted, tuple(questions), tuple(questions.values()), blank, limit, self.ending)
            found = Replier(self.config, self.text, self.encoder, Console(quiet=True), NAME).write(ADAPTER, prompts)
            replies.update(zip(questions, zip(found.texts, found.cut, strict=True), strict=True))
        for place, row in enumerate(rows):
            if place not in questions:
                yield _Answer()
                continue
            reply, cut = replies[place]
            shortened = self.encoder.shortened(row) is not row
            yield _Answer(reply, shortened=shortened, review=bool(cut or shortened or not reply))

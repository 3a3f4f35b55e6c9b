"""`lorakeet predict`: answers the rows of a file with a run or an adapter, and writes the file with the answers beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Candidates, Encoder, Ids
from lorakeet.data.predicted.contents import Contents, require_rereadable
from lorakeet.data.predicted.unlabelled import fitting_columns, row_shaper
from lorakeet.data.predicted.written_records import (
    TableForm,
    can_write,
    cell_text,
    form_like,
    record_writer,
    require_written_format,
)
from lorakeet.data.read import read_records
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import LEAVE_OUT, FileRecord, RowProblems, given_name
from lorakeet.data.template import uses_template
from lorakeet.disk import written_whole
from lorakeet.errors import SPELLING, ConfigError, DataError, EnvironmentProblem, Remedy, percent, spelling, spelt
from lorakeet.evaluate.answers import none_right
from lorakeet.evaluate.calibration import ReliabilityBin
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.likelihood import label_log_probs
from lorakeet.evaluate.reading.numbers import decimal_mark
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.identity import Uncertified
from lorakeet.kinds.text.evaluate import require_encodable
from lorakeet.kinds.text.reply import ADAPTER, FIRST_LINE, LINE, Prompts, Replier
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.models.generate.score import label_scores
from lorakeet.models.inject import activate
from lorakeet.models.text.model import TextModel
from lorakeet.planning.encoded_rows import within_context
from lorakeet.planning.evaluation import fit_evaluation
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.runs.open_adapter import NAME, Opened, open_adapter
from lorakeet.runs.output_paths import require_new_place, writing
from lorakeet.runs.residency import peak_said
from lorakeet.runs.trained_prompt import trained_labels
from lorakeet.train.progress import counted
from lorakeet.verbs.options import PredictOptions

TOGETHER = 2048  # rows that are in memory at once
_DECIMALS = re.compile(r"(?![-+]?\d{1,3}[.,]\d{3}$)[-+]?\d+(?:(?:\.\d{3})*,|(?:,\d{3})*\.)\d+")  # 1,5 and 1.234,5; not 1.234
_SAMPLED = 100  # records from which columns are proposed
_DIGITS = 6  # of a probability
ANSWER = "answer"
SHARES_RIGHT = ("accuracy", "exact_match", "normalised_match", "json_match", "numeric_match")  # as a headline has them
REPLIED = "reply_words"  # a metric of every system that replied
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


@dataclass(frozen=True)
class _RunReport:
    """How often the run's report found answers right: all of them, and labels by their probability."""

    right: Estimate | None = None
    bins: tuple[ReliabilityBin, ...] = ()
    lost: str = ""  # labels of which it found no row right

    @classmethod
    def of(cls, opened: Opened) -> _RunReport:
        """What the report of the run says of its adapter; nothing without a report, or where it counts no right answers."""
        if opened.run is None or not opened.run.report.is_file():
            return cls()
        report = read_report(opened.run.report)
        metric = next((one.metric for one in report.comparisons if one.metric in SHARES_RIGHT), "")
        found = [one.metrics[metric] for one in report.systems if one.role == "adapter" and metric in one.metrics]
        bins = [one.bins for one in report.reliabilities if one.role == "adapter"]
        lost = [none_right(one) for one in report.confusions[-1:]]  # the adapter's is the last
        return cls(found[0] if found else None, bins[0] if bins else (), *lost)

    def doubts(self, least: float, probability: float | None = None) -> bool:
        """Whether answers of about this probability were right less often than `least`, by the upper end of the interval."""
        near = None
        if probability is not None:
            near = min(self.bins, key=lambda one: abs(one.confidence - probability), default=None)
        found = self.right if near is None else near.accuracy
        return found is not None and found.high < least

    @property
    def said(self) -> str:
        if self.right is None:
            return ""
        lost = f", and {self.lost}" if self.lost else ""
        return f" (the report found {percent(self.right.value)} of {self.right.n:,} rows right{lost})"


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
    path = Path(options.run_or_adapter)
    opened = open_adapter(
        path, base=options.base, config=options.config, uncertified=options.uncertified, say=console.print
    ).within(options.memory)
    require_encodable(opened.config)
    labels = trained_labels(opened.run, opened.config.data)
    with spelling(_own_spelling()):
        file = _read_first(options, opened, labels)
    one_line, unknown = (False, "") if labels else _one_line(opened)
    for note in file.notes:
        say(note)
    residency = fit_evaluation(opened.config, opened.adapter, say, Workload(bool(labels), file.characters))
    with enforcing_gpu_budget(residency.budget, "Raise it with --memory."), peak_said(residency, console):
        text = dataclasses.replace(opened, residency=residency).text_model(console)
        settings = within_context(dataclasses.replace(opened.config, data=file.spec), text.name, text.context, say)
        encoder = Encoder(text.tokenizer, settings.data, labels)
        plain = not labels and not uses_template(text.tokenizer, settings.data)
        later = [unknown] if plain and unknown else []
        measured = _RunReport.of(opened)
        answerer = _Answerer(settings, text, encoder, console, options, LINE if plain and one_line else "", measured)
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


@dataclass(frozen=True)
class _RowsFile:
    """A file that was read once: how it is read and written, its columns and those that are added, its rows and characters.

    `constant` is what each row has in an added column: that the adapter is uncertified.
    """

    spec: DataSpec
    form: TableForm
    own: tuple[str, ...]
    columns: tuple[str, ...]
    rows: int
    characters: int
    notes: tuple[str, ...]
    constant: Mapping[str, str]


def _read_first(options: PredictOptions, opened: Opened, labels: Sequence[str]) -> _RowsFile:
    """Reads the whole file, so that what is wrong with it is known before the model is loaded."""
    trained = opened.config.data
    given: dict[str, Any] = {name: getattr(options, name) for name in OWN_FLAGS}
    spec = dataclasses.replace(trained, limit=None, **{key: value for key, value in given.items() if value is not None})
    spec = dataclasses.replace(spec, train=options.data, held_out=None, test=None)
    spec.validate()
    lines, empty = RowProblems(f"{given_name(options.data)} cannot be used as it is"), RowProblems(options.data)
    notes, rows, characters = list[str](), 0, 0
    try:
        form = form_like(options.data, spec, options.out, labels or None)
        if first := list(islice(read_records(options.data, lines, spec), _SAMPLED)):
            form = dataclasses.replace(form, decimal=table_decimal(first, form))
            spec, taken = fitting_columns(first, given_name(options.data), spec, labels)
            notes += [taken] if taken else []
        lines = RowProblems(f"{given_name(options.data)} cannot be used as it is")
        contents, shaped = Contents(form, options.out, lines), row_shaper(given_name(options.data), spec, labels, empty)
        for record in read_records(options.data, lines, spec):
            rows, row = rows + 1, shaped(record)
            contents.add(record)
            characters += 0 if row is None else len(row.text)
        lines.raise_if_any()
        if not rows:
            raise DataError(f"{given_name(options.data)} has no rows; expected at least one record below the header.")
    except DataError as error:
        error.remedies = tuple(_own_remedies(error.remedies))
        raise
    if empty.count == rows:
        raise DataError(f"No row of {given_name(options.data)} can be answered; first {empty.first}")
    if empty.count:
        notes.append(f"{empty.count:,} of {rows:,} rows get no answer; first {empty.first}")
    said = opened.note if isinstance(opened.note, Uncertified) else ""
    columns = _new_columns(options, trained, contents.columns, labels, uncertified=bool(said))
    constant = {columns[-1]: said} if said else {}
    if not (contents.fits and can_write(form.encoding, "".join((*columns, said)))):
        form = form.in_utf_8(options.out, "a column or a cell has")
    notes += [form.said] if form.said else []
    return _RowsFile(spec, form, tuple(contents.columns), columns, rows, characters, tuple(notes), constant)


def table_decimal(records: Sequence[FileRecord], form: TableForm) -> str:
    """The decimal mark of a table's numbers; where it has none, that of spreadsheets that separate columns in its way."""
    every = (cell_text(value).strip() for record in records for value in record.values.values())
    cells = [cell for cell in every if _DECIMALS.fullmatch(cell)]
    return decimal_mark(cells) if cells else "," if form.delimiter == ";" else "."


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


def _new_columns(
    options: PredictOptions, trained: DataSpec, known: Collection[str], labels: Sequence[str], *, uncertified: bool
) -> tuple[str, ...]:
    """The names of the added columns; ConfigError if a record of the file has one of them."""
    own = (trained.label_column or "label") if labels else ANSWER
    name = options.column or (f"{own}_predicted" if own in known else own)
    endings = ("probability", "margin") * bool(labels) + ("review",) + ("adapter",) * uncertified
    columns = (name, *(f"{name}_{ending}" for ending in endings))
    if not can_write("utf-8", name):
        raise ConfigError(f"{spelt('column')} {name!r} has half of a character. Choose another name.")
    if taken := [column for column in columns if column in known]:
        said = f"{given_name(options.data)} has a column {taken[0]!r} already."
        raise ConfigError(f"{said} Choose another name with {spelt('column')}.")
    return columns


def _one_line(opened: Opened) -> tuple[bool, str]:
    """Whether replies without a template end with their first line: as in the report, else if all training answers have one.

    A sentence, if neither is known.
    """
    why = "no training rows are named"
    try:
        if opened.run is not None and opened.run.report.is_file():
            systems = read_report(opened.run.report).systems
            replied = [one.note for one in systems if one.role == "adapter" and REPLIED in one.metrics]
            if replied:
                return FIRST_LINE in replied[0], ""
        if opened.config.data.train:
            answers = [row.turns[-1].text.strip() for row in opened.dataset.train if row.answered]
            return bool(answers) and not any(LINE in answer for answer in answers), ""
    except (DataError, EnvironmentProblem) as error:
        why = str(error).rstrip(".")
    return False, f"Answers are not cut after their first line: whether training answers have one is not known ({why})."


def _written(options: PredictOptions, file: _RowsFile, answerer: _Answerer) -> Predicted:
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


@dataclass(frozen=True)
class _Answerer:
    """The model with its adapter, and how it answers."""

    config: RunConfig
    text: TextModel
    encoder: Encoder
    console: Console
    options: PredictOptions
    ending: str
    measured: _RunReport

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
            doubtful = best < self.options.review or one.truncated or self.measured.doubts(self.options.review, best)
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
        doubted = self.measured.doubts(self.options.review)
        for place, row in enumerate(rows):
            if place not in questions:
                yield _Answer()
                continue
            reply, cut = replies[place]
            shortened = self.encoder.shortened(row) is not row
            yield _Answer(reply, shortened=shortened, review=bool(doubted or cut or shortened or not reply))

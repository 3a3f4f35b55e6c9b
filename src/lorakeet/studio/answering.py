"""Rows that a run answers: `lorakeet predict` as a job, and the file that it writes into the job's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakeet.config import read_run
from lorakeet.data.locate import WORKBOOKS
from lorakeet.errors import ConfigError
from lorakeet.studio.forms import FormField, run_fields, settings_of, typed
from lorakeet.studio.jobs import Job, Queue
from lorakeet.studio.offers import stem_of
from lorakeet.studio.places import NotHere, Places, regular_within
from lorakeet.studio.taking import jobs_of
from lorakeet.verbs.early.checks import check_early
from lorakeet.verbs.options import PredictOptions

VERB = "predict"
ROWS = "data.train"
OWN_FLAGS = ("text_column", "encoding", "delimiter")  # settings of data that are options of the command
HOW = {f"data.{name}": f"--{name.replace('_', '-')}" for name in OWN_FLAGS}
# Endings of what is written; a table otherwise.
_ENDINGS = {".tsv": ".tsv", ".jsonl": ".jsonl", ".json": ".jsonl", **dict.fromkeys(WORKBOOKS, ".xlsx")}
_NONE = {"data.delimiter": "a comma, or a tab in .tsv files"}  # what no setting means
_LONGEST_STEM = 60  # letters, of at most four bytes: a file's name has at most 255
_HELP = "A table like the one of the training, with a text in each row. Labels are not needed."


def answer_fields(folder: Path) -> list[FormField]:
    """The fields of the form: the rows, and how they are read where it differs from the training, whose settings are shown."""
    trained, by_path = settings_of(folder), {field.path: field for field in run_fields()}
    how = []
    for field in (by_path[path] for path in HOW):
        read = trained.get(field.path, field.default)
        read = _NONE.get(field.path, read) if read == "none" else read
        how.append(replace(field, default=read, help=f"{field.help} Left empty, it is as in the training: {read}."))
    return [replace(by_path[ROWS], help=_HELP), *how]


def add_answers(places: Places, queue: Queue, run: str, form: Mapping[str, str], once: str = "") -> Job:
    """Puts the command that answers the rows of a form into the queue. Raises what `wanted_answers` raises."""
    options = wanted_answers(places, run, form)
    device = read_run(places.run(run) / "config.yaml").model.device
    words = answer_words(options, f"{{folder}}/{options.out.name}")
    return queue.add(words, title=f"Rows answered: {options.out.name}", device=device, once=once)


def answer_words(options: PredictOptions, out: str) -> list[str]:
    """The words of the command that answers rows, with the file `out`."""
    given = [f"--{name.replace('_', '-')}={value}" for name in OWN_FLAGS if (value := getattr(options, name)) is not None]
    return [VERB, options.run_or_adapter, f"--data={options.data}", "--out", out, *given]


def wanted_answers(places: Places, run: str, form: Mapping[str, str]) -> PredictOptions:
    """The options of the command that answers the rows of a form; `out` is a name alone.

    ConfigError without rows or for rows of elsewhere; DataError for rows that are not there; NotHere without an adapter.
    """
    folder, rows = places.run(run), typed(form.get(ROWS, "")).strip()
    if not (folder / "adapter").is_dir():
        raise NotHere(f"'{run}' has no adapter yet. Wait until it has trained, or resume it.")
    if not rows:
        raise ConfigError("No file of rows is chosen. Choose one first.")
    places.require({ROWS: rows})
    stem = stem_of(Path(rows).name)[:_LONGEST_STEM] or "rows"
    name = f"{stem}-answered{_ENDINGS.get(Path(rows.partition('#')[0]).suffix.lower(), '.csv')}"
    given: dict[str, Any] = {name: typed(form.get(f"data.{name}", "")).strip() or None for name in OWN_FLAGS}
    options = PredictOptions(str(folder), rows, Path(name), **given)
    check_early(VERB, replace(options, out=places.own / "answers" / name), None)
    return options


def written_file(places: Places, queue: Queue, run: str, name: str) -> Path:
    """The one file that the job `name` of a run has written: into its own folder, or beside the run.

    NotHere before it is done, and for a job that writes a folder.
    """
    places.run(run)
    for job in jobs_of(places, queue, run):
        if job.name == name and job.state == "done" and (out := _saved(job)) is not None:
            return out
    raise NotHere("There is no such file. It may have been deleted or moved; make it again.")


def forget_answers(places: Places, queue: Queue, run: str, name: str) -> None:
    """Removes the job `name` of a run, with the file of answers that it holds, and earlier attempts that made none.

    NotHere for any other job.
    """
    places.run(run)
    jobs = jobs_of(places, queue, run)
    for place, job in enumerate(jobs):
        if job.name == name and job.kept is not None:
            attempts = [one for one in jobs[place + 1 :] if one.title == job.title and one.kept is None]
            for one in (job, *(one for one in attempts if one.state not in ("waiting", "running"))):
                queue.forget(one)
            return
    raise NotHere("There is no such file. It may have been deleted already.")


def _saved(job: Job) -> Path | None:
    """What a job has written, if that is one file."""
    out = job.out
    return out if out is not None and regular_within(job.folder.parents[2], out) else None  # among the runs, as its own folder is


def answer_values(job: Job) -> dict[str, object]:
    """What the page shows of a job besides its state: the file to save, what was counted, the form that mends it."""
    saved = _saved(job) if job.state == "done" else None
    counted = str(next(iter(job.results), {}).get("summary", "")) if saved and job.words[0] == VERB else ""
    again, labels = _mended(job) if job.words[0] == VERB else {}, {field.path: field.label for field in run_fields()}
    how = [f"{labels[path]} {value}" for path, value in again.items() if path != ROWS]
    return {
        "saves": saved.name if saved else "", "counted": counted, "again": again,
        "again_words": f"Answer them with {', '.join(how)}" if again else "", "held": job.kept is not None,
    }  # fmt: skip


def _mended(job: Job) -> dict[str, str]:
    """The form of a failed job with the remedies of its error; empty if that is nothing new."""
    if job.state != "failed" or (problem := job.problem) is None:
        return {}
    before = dict(word.split("=", 1) for word in job.words if word.startswith("--") and "=" in word)
    form = {path: before[flag] for path, flag in {ROWS: "--data", **HOW}.items() if flag in before}
    given = {f"--{one.setting}": one.value for one in problem.remedies}
    advised = {path: given[flag] for path, flag in HOW.items() if flag in given}
    return {**form, **advised} if advised.items() - form.items() else {}

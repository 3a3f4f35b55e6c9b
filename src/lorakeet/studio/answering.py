"""Rows that a run answers: `lorakeet predict` as a job, and the file that it writes into the job's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lorakeet.config import read_run
from lorakeet.errors import ConfigError
from lorakeet.studio.forms import FormField, run_fields, settings_of
from lorakeet.studio.jobs import Job, Queue
from lorakeet.studio.places import NotHere, Places, regular_within
from lorakeet.studio.remedies import advised_value
from lorakeet.studio.taking import jobs_of, out_of

VERB = "predict"
ROWS = "data.train"
HOW = {"data.text_column": "--text-column", "data.encoding": "--encoding", "data.delimiter": "--delimiter"}
_ENDINGS = {".tsv": ".tsv", ".jsonl": ".jsonl", ".json": ".jsonl"}  # of what is written; a table otherwise
_HELP = "A table like the one of the training, with a text in each row. Labels are not needed."


def answer_fields(folder: Path) -> list[FormField]:
    """The fields of the form: the rows, and how they are read where it differs from the training, whose settings are shown."""
    trained, by_path = settings_of(folder), {field.path: field for field in run_fields()}
    how = [replace(by_path[path], default=trained.get(path, by_path[path].default)) for path in HOW]
    return [replace(by_path[ROWS], help=_HELP), *how]


def add_answers(places: Places, queue: Queue, run: str, form: Mapping[str, str]) -> Job:
    """Puts the command that answers the rows of a form into the queue. ConfigError without rows, or for rows of elsewhere."""
    folder, rows = places.run(run), form.get(ROWS, "").strip()
    if not (folder / "adapter").is_dir():
        raise NotHere(f"'{run}' has no adapter yet. Wait until it has trained, or resume it.")
    if not rows:
        raise ConfigError("No file of rows is chosen. Choose one first.")
    places.require({ROWS: rows})
    name = f"{Path(rows).name.partition('.')[0] or 'rows'}-answered{_ENDINGS.get(Path(rows).suffix.lower(), '.csv')}"
    words = [VERB, str(folder), f"--data={rows}", "--out", f"{{folder}}/{name}"]
    words += [f"{flag}={value}" for path, flag in HOW.items() if (value := form.get(path, "").strip())]
    device = read_run(folder / "config.yaml").model.device
    return queue.add(words, title=f"Rows answered: {name}", device=device, once=form.get("once", ""))


def written_file(queue: Queue, folder: Path, name: str) -> Path:
    """The one file that the job `name` of the run in `folder` has written: into its own folder, or beside the run.

    NotHere before it is done, and for a job that writes a folder.
    """
    for job in jobs_of(queue, folder):
        if job.name == name and job.state == "done" and (out := _saved(job)) is not None:
            return out
    raise NotHere("There is no such file. It may have been deleted or moved; make it again.")


def _saved(job: Job) -> Path | None:
    """What a job has written, if that is one file."""
    out = out_of(job)
    return out if out is not None and regular_within(job.folder.parents[2], out) else None  # among the runs, as its own folder is


def answer_values(job: Job) -> dict[str, object]:
    """What the page shows of a job besides its state: the file to save, what was counted, the form that mends it."""
    saved = _saved(job) if job.state == "done" else None
    out = saved if job.words[0] == VERB else None
    ending = f": {out}"  # of the line that the command says it with; libraries may say more after it
    counted = [line.removesuffix(ending) for line in job.log.splitlines() if line.endswith(ending)] if out else []
    again = _mended(job) if job.words[0] == VERB else {}
    return {"saves": saved.name if saved else "", "counted": counted[-1] if counted else "", "again": again}


def _mended(job: Job) -> dict[str, str]:
    """The form of a failed job with what its message advises; empty if that is nothing new."""
    if job.state != "failed":
        return {}
    before = dict(word.split("=", 1) for word in job.words if word.startswith("--") and "=" in word)
    form = {path: before[flag] for path, flag in {ROWS: "--data", **HOW}.items() if flag in before}
    advised = {path: value for path, flag in HOW.items() if (value := _advised(job.error, flag))}
    return {**form, **advised} if advised.items() - form.items() else {}


def _advised(message: str, flag: str) -> str:
    """The value that a message writes behind a flag; empty without one, and where a sentence goes on there."""
    rest = message.partition(f"{flag} ")[2]
    return "" if rest.startswith("to the ") else advised_value(rest)

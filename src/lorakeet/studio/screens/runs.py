"""Runs: the table, curves over each other, two runs compared on the same rows, tags, and deleting with undo."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.errors import ConfigError, DataError, LorakeetError
from lorakeet.evaluate.report.charts import interval_axis
from lorakeet.evaluate.wording import metric_words
from lorakeet.studio.deleted import DeletedRun, delete_run, deleted_runs, erase_run, jobs_erased_with, jobs_of_run, restore_run
from lorakeet.studio.forms import settings_of
from lorakeet.studio.index import RunSummary, write_tags
from lorakeet.studio.jobs import Job, locked_files
from lorakeet.studio.live import GOING, all_records, followed, job_of, run_state, thinned
from lorakeet.studio.pages import Screen, Studio, form_of, moved, page, studio_of
from lorakeet.studio.pairing import PairedRuns, measuring, pair_runs, was_measured, whole_report
from lorakeet.train.run import RunFolder

_AT_ONCE = 40  # runs that are read for one page; the page gets the others by itself
_OVERLAID = 8


@dataclass(frozen=True)
class RunLine:
    """One line of the table."""

    run: RunSummary
    state: str
    spark: str  # the points of its small curve, in a box of 100 by 24
    age: str
    again: str = ""  # the settings to start again with, as an address has them: of one that made no folder


def lines_of(studio: Studio, most: int | None = None) -> list[RunLine]:
    """The runs, the newest first, and before them those without a folder: they wait, run, or were stopped before a step."""
    summaries = studio.index.summaries(most)
    jobs = {job.run: job for job in studio.queue.jobs() if job.run}
    known = {summary.name for summary in summaries}
    gone = known | {one.name for one in deleted_runs(studio.places)}
    bare = [_bare_line(studio, job) for job in jobs.values() if job.run not in gone and _is_bare(studio, job)]
    locked = locked_files()
    lines = [
        RunLine(run, _state(studio, run, jobs, locked), sparkline(run.spark), age_of(time.time() - run.made)) for run in summaries
    ]
    return [*reversed(bare), *lines]


def _is_bare(studio: Studio, job: Job) -> bool:
    """True for a run that waits, or was over, before it had a folder; not for one that was taken out of the queue."""
    return job.state not in ("done", "cancelled") and RunFolder.at(studio.places.runs / job.run) is None


def _goes_on(job: Job) -> bool:
    return job.state in ("waiting", "running")


def _bare_line(studio: Studio, job: Job) -> RunLine:
    live, settings = followed(studio.places, studio.queue, job.run, job), settings_of(job.folder)
    run = RunSummary(
        name=job.run, made=job.made, model=settings.get("model.path", ""), rows=settings.get("data.train", ""),
        problem="" if live.state in GOING else live.message or live.said,
    )  # fmt: skip
    again = "" if live.state in GOING else urlencode(settings)
    return RunLine(run, job.state, "", age_of(time.time() - job.made), again)


def sparkline(values: tuple[float, ...]) -> str:
    """The points of a polyline in a box of 100 by 24, low values at its bottom."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return " ".join(f"{100 * i / (len(values) - 1):.1f},{22 - 20 * (value - low) / span:.1f}" for i, value in enumerate(values))


def age_of(seconds: float) -> str:
    """How long ago, as people say it."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def _state(studio: Studio, run: RunSummary, jobs: Mapping[str, Job], locked: frozenset[str]) -> str:
    """As the run's own page says it; in a folder without a report, what the job or the metrics say."""
    job = job_of(studio.places, studio.queue, run.name) if run.name in jobs else None
    state = run_state(RunFolder.at(studio.places.runs / run.name), job, locked)
    return run.ended or state if state == "unfinished" else state


def _list(request: Request) -> Response:
    studio = studio_of(request)
    lines = lines_of(studio, _AT_ONCE)
    known = {line.run.name for line in lines}
    left = sum(name not in known for name in studio.index.names())
    deleted = [(one, age_of(time.time() - one.deleted), _answers_in(studio, one)) for one in deleted_runs(studio.places)]
    undo = next((one.key for one, *_ in deleted if one.key == request.query_params.get("undo")), "")
    return page(request, "runs.html", lines=lines, left=left, deleted=deleted, undo=undo, folder=str(studio.places.runs))


def _answers_in(studio: Studio, one: DeletedRun) -> int:
    """How many files of answers go with a run of the bin."""
    return sum(job.kept is not None for job in jobs_erased_with(studio.places, studio.queue, one))


def _names(request: Request) -> list[str]:
    studio = studio_of(request)
    found = list(dict.fromkeys(request.query_params.getlist("name")))
    for name in found:
        studio.places.run(name)
    return found


def _overlay(request: Request) -> Response:
    studio, names = studio_of(request), _names(request)
    if not 1 <= len(names) <= _OVERLAID:
        raise ConfigError(f"{len(names)} runs are chosen; choose 1 to {_OVERLAID} in the table to see their curves.")
    curves = []
    for name in names:
        records = thinned(all_records(studio.places.run(name)), 600)
        points = [
            {"x": record["step"], "y": record["held_out_loss"], "low": record.get("low"), "high": record.get("high")}
            for record in records
            if record.get("held_out_loss") is not None
        ]
        curves.append({"name": name, "points": points})
    return page(request, "overlay.html", names=names, curves=curves, folder=str(studio.places.runs))


def _compare(request: Request) -> Response:
    studio, names = studio_of(request), _names(request)
    if len(names) != 2:
        raise ConfigError(f"{len(names)} runs are chosen; a comparison needs two. Choose two in the table.")
    reports = [whole_report(studio.places, name) for name in names]
    found: PairedRuns | None = None
    problem, missing = "", [name for name, report in zip(names, reports, strict=True) if report is None]
    commands: list[tuple[list[str], str]] = []
    running: list[Job] = []
    try:
        if reports[0] is not None and reports[1] is not None:
            found = pair_runs((names[0], reports[0]), (names[1], reports[1]))
    except LorakeetError as error:
        problem, missing = str(error), [name for name in names if not was_measured(studio.places, name)]
    try:
        measured = [measuring(studio.places, name) for name in missing or names]
        commands = [([word.replace("{folder}/", "") for word in words], file) for words, file in measured]
        running = [job for job in studio.queue.jobs() if job.title in map(_title, missing) and _goes_on(job)]
    except LorakeetError as error:
        problem = str(error)
    failed = [job for job in studio.queue.jobs() if job.title in map(_title, missing) and job.state == "failed"][-1:]
    return page(
        request, "compare.html", names=names, missing=missing, commands=commands, running=running, found=found, problem=problem,
        said=_said(found) if found else "", bar=_bar(found) if found else None, failed=failed,
        words=metric_words(found.comparison.metric) if found else None,
    )  # fmt: skip


def _measure(request: Request) -> Response:
    """Puts the commands that measure both runs on all rows into the queue, where they are needed."""
    studio, names = studio_of(request), _names(request)
    waiting = {job.title for job in studio.queue.jobs() if _goes_on(job)}
    wanted = form_of(request).get("missing", "").split("/")
    for name in names:
        needed = name in wanted or whole_report(studio.places, name) is None
        if needed and not was_measured(studio.places, name) and _title(name) not in waiting:
            words, file = measuring(studio.places, name)
            studio.queue.add(words, title=_title(name), files={"run.yaml": file}, once=f"measures {words[-1]}")
    return moved("/runs/compare?" + request.url.query)


def _title(name: str) -> str:
    return f"Measure {name} on all rows"


def _said(found: PairedRuns) -> str:
    """The comparison as one sentence."""
    one, words = found.comparison, metric_words(found.comparison.metric)
    difference = words.said(one.difference.value)
    interval = f"95 % interval {words.ends(one.difference, signs=True)}, {one.difference.n} rows"
    if one.verdict == "no difference shown":
        return f"No difference is shown between {one.left} and {one.right}: {difference} ({interval})."
    return f"{one.left} is {one.verdict} than {one.right}: {difference} ({interval})."


def _bar(found: PairedRuns) -> dict[str, float]:
    """Where the interval lies in a box of 100: low, value, high and zero."""
    difference = found.comparison.difference
    scale = interval_axis([difference], zero=True)
    values = {"low": difference.low, "value": difference.value, "high": difference.high, "zero": 0.0}
    return {name: scale.at(value) for name, value in values.items()}


def _tag(request: Request) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    tags = [part.strip() for part in form_of(request).get("tags", "").split(",")]
    tags = list(dict.fromkeys(tag for tag in tags if tag))
    if len(tags) > 20 or any(len(tag) > 40 for tag in tags):
        raise DataError("A run has at most 20 tags of 40 characters. Shorten them.")
    write_tags(studio.places.run(name), tuple(tags))
    return moved("/runs")


def _delete(request: Request) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    if RunFolder.at(studio.places.new_run(name)) is None:  # it ended before it had a folder: there is nothing to keep
        for job in jobs_of_run(studio.places, studio.queue, name):
            studio.queue.forget(job)
        return moved("/runs")
    gone = delete_run(studio.places, studio.queue, name)
    return moved("/runs", {"undo": gone.key})


def _restore(request: Request) -> Response:
    studio = studio_of(request)
    restore_run(studio.places, studio.queue, form_of(request).get("key", ""))
    return moved("/runs")


def _erase(request: Request) -> Response:
    studio = studio_of(request)
    erase_run(studio.places, studio.queue, form_of(request).get("key", ""))
    return moved("/runs")


SCREEN = Screen(
    "Runs",
    "/runs",
    (
        Route("/runs", _list),
        Route("/runs/overlay", _overlay),
        Route("/runs/compare", _compare, methods=["GET"]),
        Route("/runs/compare", _measure, methods=["POST"]),
        Route("/runs/restore", _restore, methods=["POST"]),
        Route("/runs/erase", _erase, methods=["POST"]),
        Route("/runs/{name}/tags", _tag, methods=["POST"]),
        Route("/runs/{name}/delete", _delete, methods=["POST"]),
    ),
)

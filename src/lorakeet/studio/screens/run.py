"""Run: a run is prepared, started, followed, stopped and resumed; and the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.config import RunConfig
from lorakeet.disk import open_regular
from lorakeet.errors import ConfigError, DataError, LorakeetError
from lorakeet.studio.forms import (
    command_line,
    first_fields,
    given_settings,
    more_fields,
    run_config,
    run_file,
    run_words,
    settings_of,
)  # fmt: skip
from lorakeet.studio.jobs import Job
from lorakeet.studio.live import (
    GOING,
    LiveRun,
    RunNumbers,
    drawn_samples,
    followed,
    job_of,
    live_run,
    new_records,
    plain_values,
    run_state,
    thinned,
)  # fmt: skip
from lorakeet.studio.offers import UPLOAD, offers, stem_of
from lorakeet.studio.pages import (
    Screen,
    Studio,
    draft_of,
    event,
    event_stream,
    form_of,
    json_answer,
    moved,
    once_of,
    page,
    page_address,
    problems_of,
    refused_values,
    studio_of,
)  # fmt: skip
from lorakeet.studio.places import NotHere
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.checks import check_early
from lorakeet.verbs.options import FinetuneOptions

EVERY = 0.4  # seconds between two reads of a run's files


def prepared(studio: Studio, given: dict[str, str]) -> RunConfig:
    """The run of a form's settings, checked as the command checks it before it starts. LorakeetError lists what is wrong."""
    settings = {name: text for name, text in given.items() if name != "out"}
    out = studio.places.new_run(given.get("out") or free_name(studio, given))
    studio.places.require(settings)
    config = run_config(settings, out)
    if RunFolder.at(out) is not None:
        raise ConfigError(f"There is a run '{out.name}' already; nothing in it was touched. Choose another name.")
    check_early("finetune", FinetuneOptions(), config)
    if any(job.run == out.name and job.state in ("waiting", "running") for job in studio.queue.jobs()):
        raise ConfigError(f"A run '{out.name}' waits or runs already. Choose another name.")
    return config


def free_name(studio: Studio, given: dict[str, str]) -> str:
    """A name for a run that is not taken, after its rows."""
    stem = "".join(letter if letter.isalnum() else " " for letter in stem_of(Path(given.get("data.train", "")).name))
    name, number = "-".join(stem.lower().split()) or "run", 1
    taken = {job.run for job in studio.queue.jobs()}
    while (found := f"{name}-{number}") in taken or (studio.places.runs / found).exists():
        number += 1
    return found


def _prepare(request: Request, problems: list[str] | None = None, status: int = 200) -> Response:
    studio, draft = studio_of(request), draft_of(request)
    more = more_fields()
    return page(
        request, "run_form.html", status, fields=first_fields(), more=more, problems=problems or [], offers=offers(studio.places),
        changed={section for section, fields in more.items() if any(field.path in draft for field in fields)},
        name=draft.get("out") or free_name(studio, draft), queue=queue_of(studio),
    )  # fmt: skip


def _check(request: Request) -> Response:
    """What is missing, and the command and the run file that do the same: live, while the form changes."""
    studio, given = studio_of(request), given_settings(form_of(request))
    try:
        config = prepared(studio, given)
    except LorakeetError as error:
        of_rows = isinstance(error, DataError)  # which the screen Data shows, and mends
        return json_answer({**refused_values(error), "of_rows": of_rows})
    return json_answer({"problems": [], "command": command_line(run_words(config)), "file": run_file(config), "out": config.out})


def _start(request: Request) -> Response:
    studio, given = studio_of(request), given_settings(form_of(request))
    try:
        config = prepared(studio, given)
    except LorakeetError as error:
        return _prepare(request, problems_of(error), 400)
    out = Path(config.out)
    words, files = ["finetune", "{folder}/run.yaml"], {"run.yaml": run_file(config)}
    job = studio.queue.add(
        words, title=f"Fine-tune into {out.name}", run=out.name, device=config.model.device, files=files,
        once=once_of(request),
    )
    return moved(page_address("run", job.run))


def queue_of(studio: Studio) -> list[tuple[Job, str]]:
    """The jobs that run or wait, with their state."""
    states = [(job, job.state) for job in studio.queue.jobs()]
    return [(job, state) for job, state in states if state in ("running", "waiting")]


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _follow(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    job = job_of(studio.places, studio.queue, name)
    live = followed(studio.places, studio.queue, name, job)
    folder = studio.places.new_run(name)
    return page(
        request, "run_live.html", live=live, settings=settings_of(folder if job is None else job.folder, folder),
        words=shown_words(job) if job else ["finetune", str(folder / "config.yaml")], log=job.log if job else "",
        file=file_of(job.folder if job and file_of(job.folder) else folder),
        resume=["finetune", "--resume", str(folder)],
    )  # fmt: skip


_LARGEST_SHOWN = 1 << 18  # bytes of a run file on the page


def _at_once(request: Request) -> bool:
    return form_of(request).get("at_once") == "true"


def shown_words(job: Job) -> list[str]:
    """A job's command with run.yaml, which the page shows, in place of the job's own file."""
    return [word.removeprefix(f"{job.folder}/") for word in job.words]


def file_of(folder: Path) -> str:
    """The run file in the folder of a job or a run; empty where there is none. No link is followed."""
    for name in ("run.yaml", "config.yaml"):
        with suppress(OSError), open_regular(folder / name, follow=False) as file:
            return (file.read(_LARGEST_SHOWN) or b"").decode("utf-8", "replace")
    return ""


def _stop(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    job = job_of(studio.places, studio.queue, name)
    if job is None:
        raise ConfigError(f"'{name}' was not started here. Stop it where it was started.")
    studio.queue.stop(job, at_once=_at_once(request))
    return moved(page_address("run", name))


def _stop_job(request: Request) -> Response:
    """Stops any job, or takes it out of the queue."""
    queue = studio_of(request).queue
    queue.stop(queue.job(_name(request)), at_once=_at_once(request))
    return moved("/run")


def _resume(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    live = live_run(studio.places, studio.queue, name)
    if live.state in GOING:  # from another tab
        return moved(page_address("run", name))
    if not live.can_resume:
        raise ConfigError(f"'{name}' cannot be resumed: {live.said.lower()}.")
    device = settings_of(studio.places.run(name)).get("model.device", "auto")
    words = ["finetune", "--resume", str(studio.places.run(name))]
    studio.queue.add(words, title=f"Resume {name}", run=name, device=device, once=once_of(request))
    return moved(page_address("run", name))


def _events(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    studio.places.new_run(name)
    return event_stream(partial(_stream, studio, name))


def _state(request: Request) -> Response:
    """Whether a run that was over goes on again, without its metrics."""
    studio, name = studio_of(request), _name(request)
    state = run_state(RunFolder.at(studio.places.new_run(name)), job_of(studio.places, studio.queue, name))
    return json_answer({"goes_on": state in GOING})


@dataclass(frozen=True)
class _Moment:
    """A run's files at one moment."""

    live: LiveRun
    log: str
    samples: list[str]


def _seen(studio: Studio, name: str, numbers: RunNumbers) -> _Moment:
    job = job_of(studio.places, studio.queue, name)
    live = followed(studio.places, studio.queue, name, job, numbers)
    return _Moment(live, job.log if job else "", drawn_samples(studio.places.runs / name))


async def _stream(studio: Studio, name: str) -> AsyncIterator[str]:
    """The run and what is new in its metrics, whenever something changed; the first event has all of them.

    A run that is over ends the stream: a browser has six connections to a server, for all tabs together.
    """
    before: _Moment | None = None
    offset, numbers = 0, RunNumbers()
    while not studio.closing.is_set():
        records, end = await asyncio.to_thread(new_records, studio.places.runs / name, offset)
        restarted = before is None or end < offset
        if end < offset:  # resumed from an earlier checkpoint
            numbers = RunNumbers()
            records, end = await asyncio.to_thread(new_records, studio.places.runs / name, 0)
        numbers.feed(records)
        try:
            seen = await asyncio.to_thread(_seen, studio, name, numbers)
        except LorakeetError as error:
            yield event({"message": str(error)}, name="gone")
            return
        if records or restarted or seen != before:
            log = seen.log if before is None or seen.log != before.log else None
            values = {"run": plain_values(seen.live), "records": thinned(records), "restarted": restarted, "log": log}
            values["now"] = time.time()  # a browser elsewhere may have another clock
            yield event({**values, "samples": seen.samples}, name="run")
        if seen.live.state not in GOING and end == offset:
            yield event({}, name="over")
            return
        offset, before = end, seen
        await asyncio.sleep(0 if records else EVERY)


def _sample(request: Request) -> Response:
    """One sample that a run has drawn."""
    folder, file = studio_of(request).places.run(_name(request)), str(request.path_params["file"])
    if file not in drawn_samples(folder):
        raise NotHere(f"There is no sample {file:.200}.")
    with open_regular(folder / "progress" / file) as found:
        return Response(found.readall(), media_type="image/png")


SCREEN = Screen(
    "New run",
    "/run",
    (
        Route("/run", _prepare, methods=["GET"]),
        Route("/run", _start, methods=["POST"]),
        Route("/run-check", _check, methods=["POST"]),
        Route("/run/{name}", _follow),
        Route("/run/{name}/stop", _stop, methods=["POST"]),
        Route("/run/{name}/resume", _resume, methods=["POST"]),
        Route("/run/{name}/events", _events),
        Route("/run/{name}/state", _state),
        Route("/jobs/{name}/stop", _stop_job, methods=["POST"]),
        Route("/run/{name}/sample/{file:path}", _sample),
        UPLOAD,
    ),
    draft=True,
)

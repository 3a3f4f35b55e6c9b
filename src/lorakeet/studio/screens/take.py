"""Take away: merge, GGUF, Ollama, MLX, kohya, a hub: size and time before, the certificate after, each a job of the queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.studio.answering import answer_fields, answer_values
from lorakeet.studio.forms import command_line
from lorakeet.studio.jobs import BESIDE, Job
from lorakeet.studio.offers import offers
from lorakeet.studio.pages import (
    Screen,
    Studio,
    event,
    event_stream,
    form_of,
    json_answer,
    moved,
    once_of,
    page,
    page_address,
    studio_of,
)  # fmt: skip
from lorakeet.studio.remedies import page_words
from lorakeet.studio.screens import answer
from lorakeet.studio.taking import (
    MANY,
    QUANTS,
    Wanted,
    default_name,
    go_on_uncertified,
    job_values,
    jobs_of,
    stamp_of,
    wanted,
    ways_of,
    why_not,
)  # fmt: skip
from lorakeet.studio.trial import running_beside
from lorakeet.verbs.options import PredictOptions

WORK = "lorakeet.studio.sizing:sizes_of_run"
CHOSEN = "f16"  # the precision that is nearest to what was trained, and half of the memory of f32
EVERY = 0.5  # seconds between two reads of the jobs' files


def _newest(request: Request) -> Response:
    done = taken_runs(studio_of(request))
    return moved(page_address("take", done[0])) if done else page(request, "take_empty.html")


def taken_runs(studio: Studio) -> list[str]:
    """The runs that have an adapter, the newest first."""
    names = [run.name for run in studio.index.summaries() if run.step or run.ended == "done"]
    return [name for name in names if (studio.places.runs / name / "adapter").is_dir()]


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _take(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    ways = ways_of(studio.places, name)
    studio.workbench.start()
    return page(
        request, "take.html", name=name, ways=ways, runs=taken_runs(studio), quants=QUANTS, chosen=CHOSEN,
        names={way.key: default_name(name, way, CHOSEN) for way in ways}, offers=offers(studio.places),
        review=round(100 * PredictOptions.review), beside=running_beside(studio.queue),
        answers=answer_fields(studio.places.run(name)) if any(way.quant for way in ways) else [],
    )  # fmt: skip


def _check(request: Request) -> Response:
    """What is missing, and the command that does the same; live, while a form changes."""
    studio = studio_of(request)
    try:
        found = wanted(studio.places, _name(request), str(request.path_params["way"]), form_of(request))
    except ConfigError as error:
        return json_answer({"missing": page_words(str(error)), "command": ""})
    command = command_line(found.words) if all(found.words) else ""  # a repository is not named yet
    return json_answer({"missing": _being_made(studio, found) or why_not(found), "command": command})


def _start(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    found = wanted(studio.places, name, str(request.path_params["way"]), form_of(request))
    if not _sent_before(studio, request) and (missing := _being_made(studio, found) or why_not(found)):
        raise ConfigError(missing)
    where = found.options.name if found.out is None else found.out.name
    studio.queue.add(found.words, title=f"{found.way.title}: {where}", once=once_of(request), device=_device(found.verb))
    return moved(page_address("take", name))


def _uncertified(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    go_on_uncertified(studio.places, studio.queue, name, form_of(request).get("job", ""), once=once_of(request))
    return moved(page_address("take", name))


def _device(verb: str) -> str:
    """The device of a job: what reads the adapter alone waits for no run; the others need the memory that a run may take."""
    return BESIDE if verb in ("convert", "push") else "auto"


def _sent_before(studio: Studio, request: Request) -> bool:
    """True for the second click of a double one: the queue answers it with the job of the first."""
    once = once_of(request)
    return bool(once) and any(job.once == once for job, _ in studio.queue.going())


def _being_made(studio: Studio, found: Wanted) -> str:
    """What to say where a job writes the same result already, from another tab."""
    same = found.out is not None and any(job.out == found.out for job, _ in studio.queue.going())
    return f"{found.out.name} is being made already; see above." if found.out is not None and same else ""


def _events(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    ways_of(studio.places, name)
    return event_stream(partial(_stream, studio, name))


async def _stream(studio: Studio, name: str) -> AsyncIterator[str]:
    """The jobs of this run whenever something changed."""
    before = ""
    while not studio.closing.is_set():
        jobs = await asyncio.to_thread(jobs_of, studio.places, studio.queue, name)
        stamp = await asyncio.to_thread(stamp_of, jobs)
        if stamp != before:
            shown = await asyncio.to_thread(without_earlier_attempts, jobs)
            values = [await asyncio.to_thread(job_shown, job, log=number < MANY) for number, job in enumerate(shown)]
            yield event({"jobs": values}, name="jobs")
        before = stamp
        await asyncio.sleep(EVERY)


def without_earlier_attempts(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, the newest first, without those that made nothing and were tried again, as after a click that mends them."""
    newer: set[str] = set()
    found = []
    for job in jobs:
        if job.title not in newer or job.state in ("done", "running", "waiting"):
            found.append(job)
        newer.add(job.title)
    return found


def job_shown(job: Job, *, log: bool = True) -> dict[str, Any]:
    """The values of a job, its command as a line for a shell; without `log` not what it printed."""
    values = job_values(job)
    values["log"] = values["log"] if log else ""
    return {**values, **answer_values(job), "command": command_line(values["command"])}


def _sizes(request: Request) -> Response:
    studio, name = studio_of(request), _name(request)
    ways_of(studio.places, name)
    return event_stream(partial(_measured, studio, name))


async def _measured(studio: Studio, name: str) -> AsyncIterator[str]:
    """How large each way is, once; what is wrong ends it."""
    try:
        folder = str(studio.places.run(name))
    except LorakeetError as error:
        yield event({"message": page_words(str(error))}, name="problem")
        return
    async for found in studio.workbench.answers(WORK, {"folder": folder}):
        if "error" in found:
            yield event({"message": page_words(found["error"]["message"])}, name="problem")
        elif "sizes" in found:
            yield event(found, name="sizes")
        elif "done" in found:
            yield event({}, name="done")


SCREEN = Screen(
    "Take away",
    "/take",
    (
        Route("/take", _newest),
        Route("/take/{name}", _take),
        Route("/take/{name}/events", _events),
        Route("/take/{name}/sizes", _sizes),
        *answer.ROUTES,
        Route("/take/{name}/{way}/check", _check, methods=["POST"]),
        Route("/take/{name}/uncertified", _uncertified, methods=["POST"]),
        Route("/take/{name}/{way}", _start, methods=["POST"]),
    ),
)

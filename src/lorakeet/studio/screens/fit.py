"""Fit: whether a run fits the memory of this machine or another, before anything is downloaded; live, while settings change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.config import read_run
from lorakeet.data.spec import NO_ROWS
from lorakeet.errors import LorakeetError
from lorakeet.studio.forms import FormField, command_line, run_fields, run_file, run_words
from lorakeet.studio.offers import offers
from lorakeet.studio.pages import Screen, Studio, draft_of, event, event_stream, page, refused_values, studio_of
from lorakeet.verbs.early.checks import check_early
from lorakeet.verbs.options import PlanOptions

WORK = "lorakeet.studio.fitting:fit"
OWN_BUDGET = "budget"
MACHINES = {
    "this": "this machine, as it is now",
    **{f"gpu-{size}": f"a GPU of {size} GB" for size in (8, 12, 16, 24, 48, 80)},
    **{f"cpu-{size}": f"a computer with {size} GB, no GPU" for size in (8, 16, 32, 64)},
    OWN_BUDGET: "a budget of your own",
}
CHOSEN = ("model.path", "data.train")
MOVED = (
    "model.quantize.method", "lora.rank", "lora.target_modules", "data.max_tokens", "train.batch_size", "train.micro_tokens",
    "train.moments",
)  # fmt: skip
SLIDERS = {"lora.rank": (0, 8), "data.max_tokens": (6, 13), "train.batch_size": (0, 7), "train.micro_tokens": (8, 14)}


def named_fields(paths: tuple[str, ...]) -> list[FormField]:
    """The fields of these settings; the model alone is needed."""
    by_path = {field.path: field for field in run_fields()}
    return [replace(by_path[path], required=path == "model.path") for path in paths]


def same_words(settings: Mapping[str, str], machine: str) -> dict[str, str]:
    """The command that prints the same, and the run file. Raises ConfigError that lists every problem, as the command does."""
    config = read_run(None, {"data.train": NO_ROWS, **settings})
    check_early("plan", PlanOptions(), config)
    words, rows = run_words(config, "plan"), config.data.train
    if rows == NO_ROWS:
        place = words.index(NO_ROWS)
        del words[place - 1 : place + 1]
    if machine != OWN_BUDGET and not config.memory.limit:
        words += ["--machine", machine]
    return {"command": command_line(words), "file": run_file(config) if rows != NO_ROWS else ""}


def machine_of_request(request: Request) -> str:
    """The machine that an address names, this one by default."""
    named = request.query_params.get("machine", "")
    if draft_of(request).get("memory.budget"):
        return OWN_BUDGET
    return named if named in MACHINES else "this"


def _fit(request: Request) -> Response:
    studio, draft = studio_of(request), draft_of(request)
    studio.workbench.start()
    found = offers(studio.places)
    return page(
        request, "fit.html", chosen=named_fields(CHOSEN), moved=named_fields(MOVED), budget=named_fields(("memory.budget",))[0],
        sliders=SLIDERS, machines=MACHINES, machine=machine_of_request(request), offers=found,
        more=[path for path in draft if path not in (*CHOSEN, *MOVED, "memory.budget", "out")],
    )  # fmt: skip


def _events(request: Request) -> Response:
    settings = {name: text for name, text in draft_of(request).items() if name != "out"}
    return event_stream(partial(_stream, studio_of(request), settings, machine_of_request(request)))


async def _stream(studio: Studio, settings: Mapping[str, str], machine: str) -> AsyncIterator[str]:
    """First the same as a command, then each part of the answer, then the end; what is wrong ends it."""
    try:
        studio.places.require(settings)
        yield event(same_words(settings, machine), name="same")
    except LorakeetError as error:
        yield event(refused_values(error), name="problems")
        return
    async for found in studio.workbench.answers(WORK, {**settings, "machine": machine}):
        if "error" in found:
            yield event(refused_values(LorakeetError.from_mapping(found["error"])), name="problems")
        elif "part" in found:
            yield event(found["part"], name="part")
        else:
            yield event(found, name="done" if "done" in found else "say")


SCREEN = Screen("Fit", "/fit", (Route("/fit", _fit), Route("/fit/events", _events)), draft=True)

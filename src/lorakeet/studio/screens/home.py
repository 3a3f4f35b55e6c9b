"""The first page: what can be done, the quickstart first, and the newest runs."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.config import RunConfig, read_run
from lorakeet.studio.forms import form_settings
from lorakeet.studio.pages import Screen, moved, once_of, page, page_address, studio_of
from lorakeet.studio.screens.runs import lines_of
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.checks import require_new_run
from lorakeet.verbs.options import VERBS
from lorakeet.verbs.packages import missing_packages

_NEWEST = 5


def quickstart_config(out: str = "") -> RunConfig:
    """The run of `lorakeet quickstart`, to be written to `out`."""
    verb = next(verb for verb in VERBS if verb.name == "quickstart")
    return read_run(verb.shipped_config(), {"out": out} if out else {})


def _home(request: Request) -> Response:
    newest = lines_of(studio_of(request), _NEWEST)[:_NEWEST]
    config = quickstart_config()
    return page(request, "home.html", lines=newest, missing=missing_packages(config), chosen=form_settings(config))


def _quickstart(request: Request) -> Response:
    studio = studio_of(request)
    name = f"quickstart-{time.strftime('%Y-%m-%d-%H%M%S')}"
    folder = studio.places.new_run(name)
    require_new_run(RunFolder(folder))
    fetched = ["--yes"] if missing_packages(quickstart_config()) else []  # as the page says
    words = ["quickstart", "--out", str(folder), *fetched]
    job = studio.queue.add(words, title=f"Quickstart into {name}", run=name, once=once_of(request))
    return moved(page_address("run", job.run))


SCREEN = Screen("Start", "/", (Route("/", _home), Route("/quickstart", _quickstart, methods=["POST"])))

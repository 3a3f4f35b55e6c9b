"""The studio as an ASGI application: its screens, static files, and errors as pages."""

from __future__ import annotations

from importlib.resources import files
from typing import cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.errors import LorakeetError
from lorakeet.studio.deleted import erase_the_rest
from lorakeet.studio.index import Index
from lorakeet.studio.jobs import Queue
from lorakeet.studio.pages import Screen, Studio, asset, refused_page
from lorakeet.studio.pairing import forget_measured
from lorakeet.studio.places import NotHere, Places
from lorakeet.studio.safety import Guard, token_of
from lorakeet.studio.screens import data, fit, home, result, run, runs, take, talk

# in the order of the navigation
SCREENS: tuple[Screen, ...] = (
    home.SCREEN, data.SCREEN, fit.SCREEN, run.SCREEN, runs.SCREEN, result.SCREEN, talk.SCREEN, take.SCREEN
)  # fmt: skip
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def make_studio(places: Places) -> Studio:
    """The state of a studio on these folders; its own folder is made. Several may share one."""
    token, queue = token_of(places.own), Queue(places.own)
    queue.forget_old()
    forget_measured(places)
    erase_the_rest(places)
    return Studio(places, queue, Index(places.runs, places.own / "index.sqlite"), token)


def studio_app(studio: Studio) -> Guard:
    """The application, behind its guard."""
    routes = [Route("/static/{name}", _static), *(route for screen in SCREENS for route in screen.routes)]
    handlers = {LorakeetError: _refused, OSError: _unreadable, HTTPException: _missing, ClientDisconnect: _gone}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.studio, app.state.screens = studio, SCREENS
    return Guard(app, studio.token)


def _static(request: Request) -> Response:
    """A file of the package by its name: nothing else can be named."""
    name = str(request.path_params["name"])
    if name == "report.css":
        text = (files("lorakeet.evaluate.report") / name).read_text(encoding="utf-8")
    elif name in {entry.name for entry in (files("lorakeet.studio") / "static").iterdir()}:
        text = asset("static", name)
    else:
        raise NotHere(f"There is no file {name:.80}.")
    return Response(text, media_type=_KINDS[f".{name.rpartition('.')[2]}"], headers={"cache-control": "no-cache"})


def _refused(request: Request, error: Exception) -> Response:
    return refused_page(request, cast(LorakeetError, error))


def _unreadable(request: Request, error: Exception) -> Response:
    return refused_page(request, LorakeetError(f"The system refused: {error}. Free some space if the disk is full; try again."))


def _gone(request: Request, error: Exception) -> Response:
    """The browser was closed amid an upload, so the answer is not read."""
    return Response(status_code=400)


def _missing(request: Request, error: Exception) -> Response:
    found = cast(HTTPException, error)
    if found.status_code != 404:
        return refused_page(request, LorakeetError(f"{request.url.path:.200}, {request.method}: {found.detail}. Go back."))
    return refused_page(request, NotHere(f"There is no page {request.url.path:.200}."))

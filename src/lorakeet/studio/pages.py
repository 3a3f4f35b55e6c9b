"""What every screen uses: the studio that a request is for, its templates, and answers."""

from __future__ import annotations

import hashlib
import json
import secrets
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, cast
from urllib.parse import quote, urlencode

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from lorakeet.errors import LorakeetError, percent
from lorakeet.evaluate.report.templates import page_templates
from lorakeet.evaluate.wording import bytes_text, duration_text, number
from lorakeet.studio.forms import command_line, given_settings
from lorakeet.studio.index import Index
from lorakeet.studio.jobs import Queue
from lorakeet.studio.places import NotHere, Places
from lorakeet.studio.remedies import page_words, remedies_together
from lorakeet.studio.safety import FORM, csrf_of
from lorakeet.studio.workbench import Workbench

THEME = "lorakeet-theme"  # a cookie: light or dark; without it the browser's own


@dataclass(frozen=True)
class Studio:
    """All that the screens share."""

    places: Places
    queue: Queue
    index: Index
    token: str
    closing: threading.Event = field(default_factory=threading.Event)
    workbench: Workbench = field(default_factory=Workbench)


@dataclass(frozen=True)
class Screen:
    """One entry of the navigation and its routes. With `draft` its links carry the settings of the run that is being prepared."""

    title: str
    path: str
    routes: tuple[Route, ...]
    draft: bool = False


def studio_of(request: Request) -> Studio:
    """The studio that answers this request."""
    return cast(Studio, request.app.state.studio)


def form_of(request: Request) -> dict[str, str]:
    """The fields of a posted form; its csrf token was checked."""
    return dict(request.scope.get(FORM, {}))


def once_of(request: Request) -> str:
    """What tells a form that is sent twice from another: its page's number with all of its fields; empty without a number."""
    form = form_of(request)
    about = json.dumps([request.url.path, request.url.query, sorted(form.items())])
    return hashlib.sha256(about.encode()).hexdigest()[:32] if form.get("once") else ""


def draft_of(request: Request) -> dict[str, str]:
    """The settings of the run that is being prepared, from the page's address or the posted form."""
    return given_settings({**request.query_params, **form_of(request)})


def page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """A page made by a template; everything in `values` is escaped."""
    draft, studio = draft_of(request), studio_of(request)
    query = f"?{urlencode(draft)}" if draft else ""
    links = [
        (screen.title, screen.path + (query if screen.draft else ""), _here(request, screen), screen.draft)
        for screen in request.app.state.screens
    ]
    theme = request.cookies.get(THEME, "")
    text = _templates().get_template(template).render(
        links=links,
        csrf=csrf_of(studio.token),
        once=secrets.token_hex(8),
        theme=theme if theme in ("light", "dark") else "",
        draft=draft,
        query=urlencode(draft),
        **values,
    )
    return HTMLResponse(text.encode("utf-8", "backslashreplace"), status)  # half a character may be in any name


def moved(path: str, query: Mapping[str, str] | None = None) -> Response:
    """Leads the browser to another page after a form was carried out."""
    return RedirectResponse(path + (f"?{urlencode(query)}" if query else ""), 303)


def page_address(*parts: str) -> str:
    """The address of a page; each part may have any character."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def refused_page(request: Request, error: LorakeetError) -> Response:
    """What was refused, as a page; as JSON for a script."""
    status, message = 404 if isinstance(error, NotHere) else 400, page_words(str(error))
    if request.headers.get("accept") == "application/json":
        return json_answer({"message": message}, status)
    return page(request, "error.html", status, message=message)


def json_answer(value: Any, status: int = 200) -> Response:
    """JSON in ASCII, for a script: half a character, as names of files may have, is no text of a browser's."""
    return Response(json.dumps(value, ensure_ascii=True), status, media_type="application/json")


def problems_of(error: LorakeetError) -> list[str]:
    """The messages of an error, one for each problem."""
    return [page_words(str(one)) for one in error.problems or (error,)]


def refused_values(error: LorakeetError) -> dict[str, Any]:
    """The problems of a message for a script, and what one click sets against them."""
    return {"problems": problems_of(error), "remedies": remedies_together(error.remedies)}


def event_stream(make: Callable[[], Any]) -> Response:
    """Server-sent events from an async iterator of texts that `event` has made."""
    return StreamingResponse(make(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def event(value: Any, *, name: str = "", id: str = "") -> str:
    """One server-sent event with JSON."""
    head = (f"event: {name}\n" if name else "") + (f"id: {id}\n" if id else "")
    return f"{head}data: {json.dumps(value, ensure_ascii=True)}\n\n"


def _here(request: Request, screen: Screen) -> bool:
    """True for a screen's own pages; that of one run belongs to the list of runs."""
    path = request.url.path
    if path.startswith("/run/"):
        return screen.path == "/runs"
    return path == screen.path or (screen.path != "/" and path.startswith(f"{screen.path}/"))


def asset(folder: str, name: str) -> str:
    """A file of the package: a template or a static file."""
    return (files("lorakeet.studio") / folder / name).read_text(encoding="utf-8")


@cache
def _templates() -> jinja2.Environment:
    environment = page_templates(lambda name: asset("templates", name))
    filters: dict[str, Callable[..., str]] = {
        "number": number, "percent": percent, "bytes": bytes_text, "duration": duration_text, "command": _command,
        "page_words": page_words,
        "shell": shlex.join,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment


def _command(words: Sequence[str]) -> str:
    return command_line(words)

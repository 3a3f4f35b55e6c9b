"""Take away: a file of rows is answered, and the browser saves it with the answers, and any other file that a way out makes."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from lorakeet.errors import LorakeetError
from lorakeet.studio.answering import add_answers, answer_words, forget_answers, wanted_answers, written_file
from lorakeet.studio.forms import command_line
from lorakeet.studio.pages import form_of, json_answer, moved, once_of, page_address, studio_of
from lorakeet.studio.remedies import page_words


def _answer(request: Request) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    add_answers(studio.places, studio.queue, name, form_of(request), once=once_of(request))
    return moved(page_address("take", name))


def _check(request: Request) -> Response:
    """What is missing, and the command that does the same; live, while the form changes."""
    try:
        options = wanted_answers(studio_of(request).places, str(request.path_params["name"]), form_of(request))
    except LorakeetError as error:
        return json_answer({"missing": page_words(str(error)), "command": ""})
    return json_answer({"missing": "", "command": command_line(answer_words(options, options.out.name))})


def _save(request: Request) -> Response:
    """The file as it was written; the browser keeps it under its name and shows nothing of it."""
    studio, name = studio_of(request), str(request.path_params["name"])
    path = written_file(studio.places, studio.queue, name, str(request.path_params["job"]))
    said = quote(path.name.encode("utf-8", "replace"))  # a name on disk may have bytes that no text has
    named = {"content-disposition": f"attachment; filename*=utf-8''{said}"}
    return FileResponse(path, headers=named, media_type="application/octet-stream")


def _forget(request: Request) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    forget_answers(studio.places, studio.queue, name, str(request.path_params["job"]))
    return moved(page_address("take", name))


ROUTES = (
    Route("/take/{name}/answer", _answer, methods=["POST"]),
    Route("/take/{name}/answer/check", _check, methods=["POST"]),
    Route("/take/{name}/saved/{job}", _save),
    Route("/take/{name}/saved/{job}/delete", _forget, methods=["POST"]),
)

"""Take away: a file of rows is answered, and the browser saves it with the answers, and any other file that a way out makes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from lorakeet.studio.answering import add_answers, written_file
from lorakeet.studio.pages import form_of, moved, page_address, studio_of


def _answer(request: Request) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    add_answers(studio.places, studio.queue, name, form_of(request))
    return moved(page_address("take", name))


def _save(request: Request) -> Response:
    """The file as it was written; the browser keeps it under its name and shows nothing of it."""
    studio, name = studio_of(request), str(request.path_params["name"])
    path = written_file(studio.queue, studio.places.run(name), str(request.path_params["job"]))
    return FileResponse(path, filename=path.name, media_type="application/octet-stream")


ROUTES = (
    Route("/take/{name}/answer", _answer, methods=["POST"]),
    Route("/take/{name}/saved/{job}", _save),
)

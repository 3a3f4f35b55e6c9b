"""Try, for image runs: one prompt at several strengths of the adapter, with a slider between them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.errors import LorakeetError
from lorakeet.studio.drawing import draw_strengths, drawing_jobs, drawn_pictures, picture_bytes
from lorakeet.studio.forms import settings_of
from lorakeet.studio.pages import form_of, moved, once_of, page, page_address, studio_of
from lorakeet.studio.remedies import page_words
from lorakeet.studio.taking import add_uncertified, is_uncertified


def _pictures(request: Request, problem: str = "", status: int = 200) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    folder = studio.places.run(name)
    jobs = drawing_jobs(studio.places, studio.queue, name)
    job = jobs[0] if jobs else None
    prompts = settings_of(folder).get("diffusion.prompts", "")
    form = form_of(request)
    return page(
        request, "pictures.html", status, name=name, job=job, state=job.state if job else "", problem=problem,
        error=page_words(job.error) if job else "",
        refused=job is not None and is_uncertified(job),
        pictures=drawn_pictures(job) if job else [], prompt=form.get("prompt") or prompts.partition(",")[0],
        seed=form.get("seed", "0"), steps=form.get("steps", "30"),
        words=list(job.words) if job else ["generate", "--adapter", f"it={folder}", "--prompt", "…", "--out", "pictures"],
    )  # fmt: skip


def _draw(request: Request) -> Response:
    studio, name, form = studio_of(request), str(request.path_params["name"]), form_of(request)
    given = {key: form.get(key, "") for key in ("prompt", "seed", "steps")}
    try:
        jobs = drawing_jobs(studio.places, studio.queue, name) if "uncertified" in form else []
        if jobs and is_uncertified(jobs[0]):
            add_uncertified(studio.queue, jobs[0], once=once_of(request))
        else:
            draw_strengths(studio.places, studio.queue, name, **given, once=once_of(request))
    except LorakeetError as error:
        return _pictures(request, str(error), 400)
    return moved(page_address("try", "pictures", name))


def _picture(request: Request) -> Response:
    job = studio_of(request).queue.job(str(request.path_params["job"]))
    return Response(picture_bytes(job, str(request.path_params["file"])), media_type="image/png")


ROUTES = (
    Route("/try/pictures/{name}", _pictures, methods=["GET"]),
    Route("/try/pictures/{name}", _draw, methods=["POST"]),
    Route("/try/pictures/{job}/{file}", _picture),
)

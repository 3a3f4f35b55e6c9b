"""Try, for runs whose kind draws samples: one prompt at several strengths of the adapter, with a slider between them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.errors import LorakeetError
from lorakeet.studio.drawing import draw_strengths, drawing_jobs, sample_bytes, samples_of, sampling_verb
from lorakeet.studio.forms import settings_of
from lorakeet.studio.pages import form_of, moved, once_of, page, page_address, studio_of
from lorakeet.studio.remedies import page_words
from lorakeet.studio.taking import add_uncertified, is_uncertified


def _strengths(request: Request, problem: str = "", status: int = 200) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    folder = studio.places.run(name)
    jobs = drawing_jobs(studio.places, studio.queue, name)
    job = jobs[0] if jobs else None
    verb = sampling_verb(folder)
    prompts = settings_of(folder).get(verb.prompts, "")
    form = form_of(request)
    return page(
        request, "strengths.html", status, name=name, job=job, state=job.state if job else "", problem=problem,
        error=page_words(job.error) if job else "",
        refused=job is not None and is_uncertified(job),
        samples=samples_of(job) if job else [], prompt=form.get("prompt") or prompts.partition(",")[0],
        seed=form.get("seed", "0"), steps=form.get("steps", "30"),
        words=list(job.words) if job else [verb.name, "--adapter", f"it={folder}", "--prompt", "…", "--out", "samples"],
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
        return _strengths(request, str(error), 400)
    return moved(page_address("try", "strengths", name))


def _sample(request: Request) -> Response:
    job = studio_of(request).queue.job(str(request.path_params["job"]))
    return Response(sample_bytes(job, str(request.path_params["file"])), media_type="image/png")


ROUTES = (
    Route("/try/strengths/{name}", _strengths, methods=["GET"]),
    Route("/try/strengths/{name}", _draw, methods=["POST"]),
    Route("/try/strengths/{job}/{file}", _sample),
)

"""Try: a chat with base and adapter side by side, with the same seed, and adapters mixed by weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.registry import declared, own_kinds
from lorakeet.studio.forms import settings_of
from lorakeet.studio.jobs import last_line
from lorakeet.studio.pages import Screen, Studio, form_of, json_answer, moved, once_of, page, page_address, studio_of
from lorakeet.studio.remedies import page_words
from lorakeet.studio.screens import strengths
from lorakeet.studio.taking import is_uncertified
from lorakeet.studio.trial import (
    TriedModel,
    add_run,
    close_trial,
    current_trial,
    examples_of,
    in_trained_prompts,
    mixed,
    open_trial,
    reply_lines,
    running_beside,
    served_base,
    shown_template,
    single_rows,
    trial_state,
)  # fmt: skip
from lorakeet.verbs.options import PredictOptions

_LONGEST = 200_000  # characters of a conversation
LONGEST_ANSWER: int = PredictOptions.max_tokens  # tokens, as `lorakeet predict`
_SAMPLING = {"temperature": 0.0, "max_tokens": float(LONGEST_ANSWER), "seed": 0.0}


def _talk(request: Request) -> Response:
    studio = studio_of(request)
    trial = current_trial(studio.queue)
    state, message = trial_state(trial)
    runs = [run for run in studio.index.summaries() if (studio.places.runs / run.name / "adapter").is_dir()]
    refused = trial.run if trial is not None and is_uncertified(trial.job) else ""
    loaded = trial if trial is not None and state in ("ready", "starting") else None
    wanted = request.query_params.get("run") or (loaded.run if loaded else "") or (runs[0].name if runs else "")
    base = next((run.model for run in runs if loaded is not None and run.name == loaded.run), "")
    return page(
        request, "talk.html", runs=runs, wanted=wanted, loaded=loaded, state=state, message=message, refused=refused,
        system=_trained(studio, loaded, "data.system"), column=_trained(studio, loaded, "data.text_column"),
        same=[run.name for run in runs if loaded is not None and run.model == base and run.name != loaded.run],
        examples=examples_of(studio.places.runs / loaded.run) if loaded else [], beside=running_beside(studio.queue),
        alone=loaded is not None and single_rows(studio.places.runs / loaded.run),
        folder=str(studio.places.runs / wanted) if wanted else "", longest=LONGEST_ANSWER,
        prompt=shown_template(studio.places.runs / loaded.run) if loaded else "",
    )  # fmt: skip


def _trained(studio: Studio, trial: TriedModel | None, path: str) -> str:
    """A setting of the run's training: its system prompt, the name of its column of texts."""
    return "" if trial is None else settings_of(studio.places.runs / trial.run).get(path, "")


def _open(request: Request) -> Response:
    studio, run = studio_of(request), form_of(request).get("run", "")
    if other := declared(settings_of(studio.places.run(run)).get("kind", own_kinds()[0])).try_page:
        return moved(page_address("try", other, run))
    uncertified = form_of(request).get("uncertified") == "true"
    open_trial(studio.places, studio.queue, run, once=once_of(request), uncertified=uncertified)
    return moved("/try", {"run": run})


def _close(request: Request) -> Response:
    close_trial(studio_of(request).queue)
    return moved("/try")


def _state(request: Request) -> Response:
    trial = current_trial(studio_of(request).queue)
    state, message = trial_state(trial)
    return json_answer({"state": state, "message": message, "log": page_words(last_line(trial.job.log)) if trial else ""})


def _ready(request: Request) -> TriedModel:
    trial = current_trial(studio_of(request).queue)
    if trial is None or trial_state(trial)[0] != "ready":
        raise ConfigError("No model is loaded. Choose a run and press Load.")
    return trial


def _add(request: Request) -> Response:
    run = form_of(request).get("run", "")
    add_run(studio_of(request).places, _ready(request), run)
    return json_answer({"run": run})


def conversation(form: Mapping[str, str], base: str) -> dict[str, Any]:
    """The body of a chat completion from a form: JSON of messages and weights, and numbers. ConfigError for anything else."""
    try:
        messages, weights = json.loads(form.get("messages", "")), json.loads(form.get("weights") or "{}")
        numbers = {name: float(form.get(name) or default) for name, default in _SAMPLING.items()}
        if not isinstance(messages, list) or not isinstance(weights, dict) or len(form["messages"]) > _LONGEST:
            raise ValueError
        amounts = {str(run): float(weight) for run, weight in weights.items()}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError("The conversation cannot be read, or it is too long. Reload the page and start again.") from error
    if not all(map(math.isfinite, (*numbers.values(), *amounts.values()))):
        raise ConfigError("A weight or a number is not finite. Type another one.")
    sampling = {"temperature": numbers["temperature"], "max_tokens": int(numbers["max_tokens"]), "seed": int(numbers["seed"])}
    return {"model": mixed(base, amounts), "messages": messages, **sampling}


def _say(request: Request) -> Response:
    """Streams one reply. What the server refuses is an error before the first byte."""
    trial = _ready(request)
    body = conversation(form_of(request), served_base(trial))
    body["messages"] = in_trained_prompts(studio_of(request).places.run(trial.run), body["messages"])
    lines = reply_lines(trial, body)
    first = next(lines, b"")

    def all_lines() -> Any:
        try:
            yield from itertools.chain([first], lines)
        except (LorakeetError, OSError) as error:
            yield f"data: {json.dumps({'error': {'message': page_words(str(error))}})}\n\n".encode()

    return StreamingResponse(all_lines(), media_type="text/event-stream")


SCREEN = Screen(
    "Try",
    "/try",
    (
        Route("/try", _talk),
        Route("/try/open", _open, methods=["POST"]),
        Route("/try/close", _close, methods=["POST"]),
        Route("/try/state", _state),
        Route("/try/add", _add, methods=["POST"]),
        Route("/try/say", _say, methods=["POST"]),
        *strengths.ROUTES,
    ),
)

"""Data: the rows of a run as it would read them: columns, trained tokens, leaks and copies, the split, lengths."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.config import read_run
from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.registry import KindDeclaration, declarations, function_at
from lorakeet.studio.forms import FormField, command_line, run_fields, run_file, run_words
from lorakeet.studio.offers import offers
from lorakeet.studio.pages import Screen, Studio, draft_of, event, event_stream, page, refused_values, studio_of

WORK = "lorakeet.studio.shown_rows:show_rows_of"
CHOSEN = ("data.train", "model.path", "kind")
COLUMNS = (
    "data.text_column", "data.label_column", "data.group_column", "data.template", "data.system", "data.format", "data.encoding",
    "data.delimiter", "data.bad_rows", "data.rename_labels",
)
SPLIT = (
    "data.max_tokens", "data.too_long", "data.held_out_fraction", "data.held_out", "data.test", "data.near_duplicates",
    "data.on_leak",
)  # fmt: skip


def data_fields(paths: tuple[str, ...]) -> list[FormField]:
    """The fields of these settings; the rows alone are needed."""
    by_path = {field.path: field for field in run_fields()}
    return [replace(by_path[path], required=path == "data.train") for path in paths]


def _kinds() -> list[KindDeclaration]:
    return [one for one in declarations().values() if not one.over]


def _others() -> str:
    """What rows can be instead of a file of rows, in words."""
    return "".join(f", or, {one.rows_help}" for one in _kinds() if one.rows_help)


def same_rows(settings: Mapping[str, str]) -> dict[str, str]:
    """The command that prints the same, and the run file; both empty without a model, which they need.

    Raises ConfigError or DataError for settings that cannot be used and rows that are not there, as the command does.
    """
    if not settings.get("data.train"):
        raise ConfigError(f"data is missing. Choose a file of rows{_others()}.")
    config = read_run(None, {"model.path": "none", **settings})
    if not config.declaration.text_model:
        function_at(config.declaration.require_rows)(config, whole=False)
    if not settings.get("model.path"):
        return {"command": "", "file": ""}
    return {"command": command_line([*run_words(config), "--dry-run"]), "file": run_file(config)}


def _data(request: Request) -> Response:
    studio, draft = studio_of(request), draft_of(request)
    studio.workbench.start()
    of_kinds = {one.name: (one.rows_called, data_fields(one.rows_settings)) for one in _kinds() if one.rows_settings}
    shown = {*CHOSEN, *COLUMNS, *SPLIT, *(path for one in _kinds() for path in one.rows_settings)}
    return page(
        request, "data.html", chosen=data_fields(CHOSEN), columns=data_fields(COLUMNS), split=data_fields(SPLIT),
        of_kinds=of_kinds, others=_others(), offers=offers(studio.places),
        more=[path for path in draft if path not in {*shown, "out"}],
    )  # fmt: skip


def _events(request: Request) -> Response:
    settings = {name: text for name, text in draft_of(request).items() if name != "out"}
    return event_stream(partial(_stream, studio_of(request), settings))


async def _stream(studio: Studio, settings: Mapping[str, str]) -> AsyncIterator[str]:
    """The same as a command, then each part of the answer, then the end; what is wrong ends it."""
    try:
        studio.places.require(settings)
        yield event(same_rows(settings), name="same")
    except LorakeetError as error:
        yield event(refused_values(error), name="problems")
        return
    async for found in studio.workbench.answers(WORK, settings):
        if "error" in found:
            yield event(refused_values(LorakeetError.from_mapping(found["error"])), name="problems")
        else:
            yield event(found, name="done" if "done" in found else "part" if "part" in found else "say")


SCREEN = Screen("Data", "/data", (Route("/data", _data), Route("/data/events", _events)), draft=True)

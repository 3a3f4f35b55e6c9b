"""Result: the verdict in one sentence, the certificate with what it does not prove, answers side by side, and the report."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from lorakeet.data.spec import DataSpec
from lorakeet.errors import LorakeetError, shortened
from lorakeet.evaluate.baselines import CONSTANT, MAJORITY
from lorakeet.evaluate.report.report import OUTCOMES, Report, read_report, render_html
from lorakeet.evaluate.verdict import WITHOUT_MODEL, named_system
from lorakeet.evaluate.wording import check_words, compact, metric_words
from lorakeet.registry import declarations
from lorakeet.runs.trained_prompt import trained_labels
from lorakeet.studio.forms import settings_of
from lorakeet.studio.pages import Screen, moved, page, page_address, studio_of
from lorakeet.studio.pairing import measuring
from lorakeet.studio.places import NotHere, Places, regular_within
from lorakeet.studio.remedies import page_words, remedies_together
from lorakeet.train.run import RunFolder

_FIRST = 12  # rows shown at once
_LONGEST_REPLY = 200  # characters of one in a sentence
_FEW = 5  # measured rows of a label, below which its share of right answers says little
_NAMED = 4  # labels that a sentence names


def report_of(places: Places, name: str) -> Report | None:
    """The report of a run; None while it has none."""
    run = RunFolder(places.run(name))
    return read_report(run.report) if regular_within(run.path, run.report) else None


def _newest(request: Request) -> Response:
    done = [run.name for run in studio_of(request).index.summaries() if run.ended == "done"]
    return moved(page_address("result", done[0])) if done else page(request, "result_empty.html")


def _result(request: Request) -> Response:
    studio, name = studio_of(request), str(request.path_params["name"])
    report = report_of(studio.places, name)
    if report is None:
        return moved(page_address("run", name))
    others = [run.name for run in studio.index.summaries() if run.ended == "done" and run.name != name]
    folder = studio.places.run(name)
    rows = settings_of(folder).get("data.train", "")
    names = list(dict.fromkeys(metric for system in report.systems for metric in system.metrics if metric_words(metric).drawn))
    counts = {outcome: sum(row.outcome == outcome for row in report.rows) for outcome in OUTCOMES}
    return page(
        request, "result.html", name=name, report=report, others=others[:50], metrics={key: metric_words(key) for key in names},
        answers=(of_kind := declarations().get(report.task)) is None or of_kind.text_model,
        outcomes=OUTCOMES, counts=counts, unproved=unproved(report, labels_of(folder)), check_words=check_words, compact=compact,
        first=_FIRST, folder=str(folder), measure=_shown(studio.places, name), plain=plain_sentences(report),
        warnings=[page_words(text, rows, report.remedies) for text in report.warnings],
        again=[(one["words"], {**settings_of(folder), **one["settings"]}) for one in remedies_together(report.remedies)],
    )  # fmt: skip


def labels_of(folder: Path) -> tuple[str, ...]:
    """The labels of a run; empty without any, and where its files do not tell."""
    run = RunFolder(folder)
    try:
        return trained_labels(run, DataSpec()) if regular_within(folder, run.split) else ()
    except LorakeetError:
        return ()


def _shown(places: Places, name: str) -> tuple[list[str], str] | None:
    """The command that lists every row, and its run file; None where it cannot be given."""
    try:
        words, file = measuring(places, name)
    except LorakeetError:
        return None
    return [word.replace("{folder}/", "") for word in words], file


def plain_sentences(report: Report) -> list[str]:
    """What the accuracies mean in rows: the adapter's and the base's, and all others that are as good as the adapter."""
    measured = [one for one in report.systems if "accuracy" in one.metrics]
    right = {one.name: round(one.metrics["accuracy"].value * report.rows_of) for one in measured}
    by_role = {one.role: one.name for one in reversed(report.systems) if one.name in right}
    if not {"adapter", "base"} <= by_role.keys():
        return []
    mine, of = right[by_role["adapter"]], report.rows_of
    found = [f"The trained model has {mine} of {of} rows right; before training it had {right[by_role['base']]} of {of}."]
    replies = [row.adapter.text for row in report.rows]
    if len(replies) == of > 1 and len(set(replies)) == 1:
        found.append(f"It gave the same answer to every row: “{shortened(str(replies[0]), _LONGEST_REPLY)}”.")
    for one in report.systems:
        if one.role != "floor" or right.get(one.name, -1) < mine:
            continue
        named = named_system(one.name)
        said = f"{named[:1].upper()}{named[1:]} has {right[one.name]} of {of} right"
        if one.name in (MAJORITY, CONSTANT):
            always = f" (it {page_words(one.note)})" if one.name == MAJORITY and one.note else ""
            found.append(f"{said}{always}: nothing shows yet that the model does more than give one answer to every row.")
        elif one.name in WITHOUT_MODEL:
            found.append(f"{said}, and needs no such model. For this task it may be all that you need.")
        else:
            found.append(f"{said}, with the same model.")
    return found


def rare_labels(report: Report, labels: Sequence[str]) -> str:
    """A sentence on the trained labels that few of the measured rows have.

    Empty where there is none, or where the report has not all rows.
    """
    if not labels or len(report.rows) != report.rows_of:
        return ""
    counts = Counter(row.truth for row in report.rows)
    rare = sorted((counts[label], label) for label in labels if counts[label] < _FEW)
    if not rare:
        return ""
    said = ", ".join(f"“{shortened(label, _LONGEST_REPLY)}” ({count or 'none'})" for count, label in rare[:_NAMED])
    more = f" and {len(rare) - _NAMED} more" if len(rare) > _NAMED else ""
    few = f"labels that few of the {report.rows_of} measured rows have"
    return f"How it does on {few}: {said}{more}. More such rows would show it."


def unproved(report: Report, labels: Sequence[str] = ()) -> list[str]:
    """What neither verdict nor certificate says, in plain words; `labels` are those of the training."""
    count = report.rows_of
    found = [
        f"How it does on other kinds of text. The verdict is about {count} {report.part} rows, which resemble the training rows.",
        "That every answer is right, or safe to act on. Read some of the answers on this page.",
        "Who made these files. A certificate compares what they compute; it is no signature.",
    ]
    if rare := rare_labels(report, labels):
        found.insert(0, rare)
    if report.verdict is not None and report.verdict.tone == "none":
        found.insert(0, "That there is no difference. With more rows, one might be shown.")
    if report.certificate is not None:
        found += [f"{str(missing)[0].upper()}{str(missing)[1:]}." for missing in report.certificate.unchecked]
    return found


def _page(request: Request) -> Response:
    """The report, made from its values: a page that a stranger has put into the folder is never shown."""
    report = report_of(studio_of(request).places, str(request.path_params["name"]))
    if report is None:
        raise NotHere("This run has no report yet.")
    policy = (
        f"sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{script_hash()}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )
    return HTMLResponse(render_html(report), headers={"content-security-policy": policy})


@cache
def script_hash() -> str:
    """The hash of the report's own script: no other one runs in its frame."""
    text = (files("lorakeet.evaluate.report") / "report.js").read_text(encoding="utf-8")
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


SCREEN = Screen(
    "Result",
    "/result",
    (Route("/result", _newest), Route("/result/{name}", _result), Route("/result/{name}/report", _page)),
)

"""The page of a first hour on a GPU: its goals, and what every stage found, in plain words. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{border-bottom:1px solid #ccc;padding:.2em .8em;text-align:left;vertical-align:top}.met{color:#060}.missed{color:#a00}"
    "td table{margin:0}code{white-space:pre-wrap}"
)
VERDICTS = {True: ("met", "met"), False: ("missed", "missed"), None: ("", "not measured")}

PARTLY = "met by what was measured"


def page(report: Mapping[str, Any]) -> str:
    """HTML of the whole report."""
    stages = report["stages"].values()
    cards, commits = (sorted({stage.get(name, "unknown") for stage in stages}) for name in ("card", "commit"))
    title = f"Lorakeet's first hour on a GPU: {' and '.join(cards)}"
    about = "<p>Goals are those of one H100.</p>"
    if max(len(cards), len(commits)) > 1:
        about += f"<p><b>Stages are of {' and '.join(map(escape, cards))}, at {' and '.join(map(escape, commits))}.</b></p>"
    if report["rehearsal"]:
        about += "<p><b>This is a rehearsal with small sizes on the CPU: its numbers mean nothing.</b></p>"
    parts = [about, "<h2>Goals</h2>", _goals(report["goals"])]
    for key, stage in report["stages"].items():
        how = f"{stage['ended']} after {stage['seconds']:.0f} s of at most {stage['limit']} s; started {stage['began']}"
        how += f" at {stage['commit']}, on {stage.get('card', 'unknown')}"
        parts.append(f"<h2>{escape(key)}. {escape(stage['title'])}</h2><p>{escape(how)}</p>{_value(stage['found'])}")
        if stage.get("said"):
            parts.append(f"<p>It ended with:</p><p><code>{escape(stage['said'])}</code></p>")
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def _goals(goals: list[Mapping[str, Any]]) -> str:
    lines = []
    for goal in goals:
        style, word = VERDICTS[goal["met"]]
        word = PARTLY if goal["met"] is None and goal["measured"] is not None else word
        word = ": ".join(filter(None, [word, escape("; ".join(goal["lacks"]))]))
        value = "" if goal["measured"] is None else _number(goal["measured"])
        cells = (escape(goal["goal"]), _number(goal["bound"]), value)
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td class='{style}'>{word}</td></tr>")
    return f"<table><tr><th>goal</th><th>bound</th><th>measured</th><th></th></tr>{''.join(lines)}</table>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = "".join(f"<tr><td>{escape(str(name))}</td><td>{_value(each)}</td></tr>" for name, each in value.items())
        return f"<table>{rows}</table>"
    if isinstance(value, list):
        return ", ".join(_value(each) for each in value) if not any(isinstance(each, Mapping) for each in value) else "".join(
            map(_value, value)
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value)
    return escape("" if value is None else str(value))


def _number(value: float) -> str:
    size = abs(value)
    if size >= 10 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"

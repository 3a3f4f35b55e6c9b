"""What a page can set with one click, and how it writes a message: settings by the labels of their fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.errors import COMMAND, Remedy, respelt, spelling
from lorakeet.settings import fields_of
from lorakeet.studio.forms import run_fields

# "data.test" in a sentence; not the flag "--data.test", which is part of a command.
_PATH = re.compile(r"(?<![-\w./])[a-z]+(?:\.[a-z_]+)+(?![\w/])")
_ORIGIN = re.compile(r" \(flag --[\w.-]+\)")
_QUOTED = re.compile(r"'/(?:[^'\n]*/)?([^'/\n]+)/?'")  # a path of this machine
_BARE = re.compile(r"(?<![\w./:~])(?:/[^\s/'\",;:()]+)+/([^\s/'\",;:()]*[^\s/'\",;:().])")
_SAID = re.compile(r"""(?<![^\s(])(?<!install )(['"])([^'"\n]+)\1(?!\w)""")  # between quotes; not what a shell reads
_PAGES = {
    "merge": "“Take away”", "export": "“Take away”", "convert": "“Take away”", "push": "“Take away”", "predict": "“Take away”",
    "finetune": "“New run”", "plan": "“Fit”", "evaluate": "“Compare two”", "serve": "“Try”", "chat": "“Try”", "generate": "“Try”",
}  # fmt: skip

Remedies = dict[str, Any]  # {"settings": {path: value}, "words": of the button}


def in_quotes(text: str) -> str:
    """The text with the quotes of a page."""
    return _SAID.sub(r"“\2”", text)


def page_words(message: str, rows: str = "", remedies: Sequence[Remedy] = ()) -> str:
    """The sentences of a message in the words of a page: settings by the labels of their fields, commands by the screens that
    do the same, files by their names; quotes are “ and ”. It changes how a text is written: nothing is decided by it.

    The file `rows` is named without its folders, as it was chosen; the values of `remedies` have their line breaks.
    """
    for value in (one.value for one in remedies):
        message = message.replace(repr(value), f"“{value}”")
    if rows:
        message = message.replace(rows, rows.rpartition("/")[2] or rows)
    with spelling(_on_page):
        message = respelt(_ORIGIN.sub("", message))
    message = _BARE.sub(r"\1", _QUOTED.sub(r"'\1'", message)).replace(" by Ctrl-C", "").replace("Ctrl-C", "Stop")
    message = in_quotes(message)
    return _PATH.sub(lambda found: _on_page(found[0]) if found[0] in _labels() else found[0], message)


def _on_page(setting: str, value: str | None = None) -> str:
    """A setting by the label of its field, an option by its name, a command by the screen that does the same."""
    if setting.startswith(COMMAND):
        verb = setting.removeprefix(COMMAND)
        if verb == "finetune" and "--resume" in (value or ""):
            return "“Resume”"
        return _PAGES.get(verb, f"lorakeet {verb} in a terminal")
    label = _labels().get(setting) or re.sub(r"[-_.]", " ", setting)
    return f"“{label}”{'' if value is None else f' {value}'}"


@cache
def _labels() -> dict[str, str]:
    """The labels of fields, by their paths and by the shorter names of flags."""
    by_path = {field.path: field.label for field in run_fields()}
    return by_path | {one.shorthand: by_path[one.path] for one in fields_of(RunConfig) if one.shorthand} | {"out": "name"}


def one_click(settings: Mapping[str, str], words: str) -> Remedies:
    """One click: what it sets, and the words on its button."""
    return {"settings": dict(settings), "words": in_quotes(words)}


def remedies_together(remedies: Sequence[Remedy]) -> list[Remedies]:
    """One click for all of these settings, then one for each; for a single one that alone. Commands have no click."""
    remedies = [one for one in remedies if one.setting]
    each = [one_click({one.setting: one.value}, f"{one.words[:1].upper()}{one.words[1:]}") for one in remedies]
    if len(each) < 2:
        return each
    words = "; ".join(f"{one.words[:1].lower()}{one.words[1:]}" for one in remedies)
    return [one_click({one.setting: one.value for one in remedies}, f"All together: {words}"), *each]

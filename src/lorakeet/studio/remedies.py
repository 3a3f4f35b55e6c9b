"""What a page can set with one click: the remedies of an error, or what its message advises."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lorakeet.config import RunConfig, read_run
from lorakeet.data.spec import NO_ROWS
from lorakeet.errors import COMMAND, LorakeetError, Remedy, respelt, spelling
from lorakeet.settings import fields_of
from lorakeet.studio.forms import run_fields

# "set --data.encoding cp1252", "set data.template, for instance '{text}'": the words of all messages that advise a value.
_ADVICE = re.compile(r"\b[Ss]et (?:--)?([a-z]+(?:\.[a-z_]+)+)(?:, for instance)? ")

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
_LINE_BREAK = "↵"  # on a button, which has one line

Remedies = dict[str, Any]  # {"settings": {path: value}, "words": of the button}


def remedies_of(message: str) -> list[Remedies]:
    """The settings that a message advises, each with the words of its button; only what the run file accepts."""
    labels = {field.path: field.label for field in run_fields()}
    found: dict[str, Remedies] = {}
    for advice in _ADVICE.finditer(message):
        path, value = advice[1], advised_value(message[advice.end() :])
        if path in labels and value and path not in found and _accepted(path, value):
            found[path] = one_click({path: value}, f"Set {labels[path]} to {in_one_line(value)}")
    return list(found.values())


def in_quotes(text: str) -> str:
    """The text with the quotes of a page."""
    return _SAID.sub(r"“\2”", text)


def in_one_line(value: str) -> str:
    """A value as a button shows it."""
    lines = (line.strip() for line in value.splitlines())
    return f" {_LINE_BREAK} ".join(lines) if value.strip() else repr(value)


def page_words(message: str, rows: str = "") -> str:
    """The sentences of a message in the words of a page: settings by the labels of their fields, commands by the screens that
    do the same, files by their names, advised texts as they are; quotes are “ and ”.

    The file `rows` is named without its folders, as it was chosen.
    """
    if rows:
        message = message.replace(rows, rows.rpartition("/")[2] or rows)
    for value in (value for one in remedies_of(message) for value in one["settings"].values()):
        message = message.replace(repr(value), f"“{value}”")
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


def remedies_of_error(error: LorakeetError) -> list[Remedies]:
    """What one click sets against an error: all of its remedies together first, then each; else what its message advises."""
    each = remedies_together(error.remedies)
    return each or remedies_of(str(error))


def remedies_together(remedies: Sequence[Remedy]) -> list[Remedies]:
    """One click for all of these, then one for each; for a single one that alone."""
    each = [one_click({one.setting: one.value}, f"{one.words[:1].upper()}{one.words[1:]}") for one in remedies]
    if len(each) < 2:
        return each
    words = "; ".join(f"{one.words[:1].lower()}{one.words[1:]}" for one in remedies)
    return [one_click({one.setting: one.value for one in remedies}, f"All together: {words}"), *each]


def advised_value(rest: str) -> str:
    """The value at the beginning of `rest`: a quoted text, or a word without the sentence's signs."""
    if rest[:1] in ("'", '"'):
        for end in (place.end() for place in re.finditer(re.escape(rest[0]), rest[1:])):
            try:
                return str(ast.literal_eval(rest[: end + 1]))
            except (ValueError, SyntaxError):
                continue
        return ""
    return rest.partition(" ")[0].partition("\n")[0].rstrip(".,;:)")


def _accepted(path: str, value: str) -> bool:
    try:
        read_run(None, {"model.path": "none", "data.train": NO_ROWS, path: value})
    except LorakeetError:
        return False
    return True

"""How messages name settings and commands in Python: as arguments and calls."""

from __future__ import annotations

import shlex
from dataclasses import fields
from functools import cache

from lorakeet.config import RunConfig
from lorakeet.errors import COMMAND
from lorakeet.settings import fields_of
from lorakeet.verbs.options import VERBS

_SECTIONS = {name: f"lk.{name.title()}" for name in ("train", "lora", "evaluate", "ranks", "preference")}
_SECTIONS |= {"model": "lk.load", "memory": "lk.load", "model.quantize": "lk.load"}
_CALLS = ("merge", "export", "verify", "evaluate", "predict", "finetune", "plan")


def as_argument(setting: str, value: str | None = None) -> str:
    """An option of a verb as an argument, a setting of a run as one of its section, and a command as a call.

    text_column='review', lk.Train(micro_tokens=512), lk.merge(RUN, into='packed').
    """
    if setting.startswith(COMMAND):
        return _call(setting.removeprefix(COMMAND), value or "")
    section, _, name = setting.rpartition(".")
    name = name.replace("-", "_")
    if value is None and (positive := name.removeprefix("no_")) in _truths():
        name, value = positive, str(positive == name)
    said = "" if value is None else value if value.isnumeric() or value.isupper() or value in ("True", "False") else repr(value)
    call = _SECTIONS.get(section)
    return f"{name}={said}" if call is None else f"{call}({'quantize' if setting == 'model.quantize.method' else name}={said})"


def in_python(setting: str, value: str | None = None) -> str:
    """`as_argument` where flags without a section are settings of a run too, such as --memory."""
    return as_argument(_shorthands().get(setting, setting), value)


def _call(verb: str, words: str) -> str:
    """A command as a call; one that Python has not as it is typed."""
    if verb not in _CALLS:
        return f"{COMMAND}{verb}{words}"
    call, given, parts = f"lk.{verb}", list[str](), shlex.split(words)
    while parts:
        word = parts.pop(0)
        if not word.startswith("--"):
            given.append(word if word.isupper() or word == "…" else repr(word))
        else:
            given.append(as_argument(word[2:], parts.pop(0) if parts and not parts[0].startswith("--") else None))
    if given and given[0].startswith("resume="):
        call, given[0] = "lk.resume", given[0].removeprefix("resume=")
    return f"{call}({', '.join(given)})" if given else call


@cache
def _shorthands() -> dict[str, str]:
    return {setting.shorthand: setting.path for setting in fields_of(RunConfig) if setting.shorthand}


@cache
def _truths() -> set[str]:
    """The names of settings and options that are true or false."""
    options = {field.name for verb in VERBS for field in fields(verb.options) if field.type in ("bool", bool)}
    return options | {setting.path.rpartition(".")[2] for setting in fields_of(RunConfig) if setting.kind is bool}

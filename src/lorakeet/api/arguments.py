"""What every function of the Python API does: refuses a value of a wrong type; messages name arguments and calls."""

from __future__ import annotations

import inspect
import numbers
import shlex
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar

from lorakeet.config import RunConfig
from lorakeet.errors import COMMAND, Problems, spelling
from lorakeet.registry import text_sections
from lorakeet.settings import fields_of
from lorakeet.verbs.options import VERBS

_SECTIONS = {name: f"lk.{name.title()}" for name in ("train", "lora", "evaluate", "ranks", *text_sections())}
_SECTIONS |= {"model": "lk.load", "memory": "lk.load", "model.quantize": "lk.load"}
_WORDS = {  # of what an argument may be, by the names of classes
    "str": "text", "Path": "a path", "int": "a whole number", "float": "a number", "bool": "True or False", "NoneType": "None",
    "Mapping": "a dict", "dict": "a dict", "Sequence": "a list", "tuple": "a list", "Callable": "a function",
    "Module": "a torch module", "Adapter": "an adapter", "FinishedRun": "a run", "BaseModelHandle": "lk.load(…)",
    "RowSet": "lk.rows(…)", "RowPart": "a part of them", "LoraSpec": "lk.Lora(…)", "TrainSpec": "lk.Train(…)",
    "RunConfig": "lk.RunConfig(…)",
}  # fmt: skip
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_CALLS = ("merge", "export", "verify", "evaluate", "predict", "finetune", "plan")


def python_call(spell: Callable[[str, str | None], str]) -> Callable[
    [Callable[_Arguments, _Result]], Callable[_Arguments, _Result]
]:  # fmt: skip
    """Makes a function one of the Python API: `spell` writes settings in its messages, and its annotations are kept.

    ConfigError names each argument that is not of its annotation.
    """

    def made(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        signature = inspect.signature(function)
        by_kind = [(one.kind, one.name) for one in signature.parameters.values()]
        several = {name for kind, name in by_kind if kind is inspect.Parameter.VAR_POSITIONAL}
        passed_on = {name for kind, name in by_kind if kind is inspect.Parameter.VAR_KEYWORD}

        @wraps(function)
        def called(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
            with spelling(spell):
                try:
                    given = signature.bind(*arguments, **named).arguments
                except TypeError:  # an argument is missing or unknown, which Python says itself
                    return function(*arguments, **named)
                require_kinds({name: value for name, value in given.items() if name not in passed_on}, function, several)
                return function(*arguments, **named)

        return called

    return made


def given_as(value: Any) -> str:
    """A value in a message: the beginning of its text in one line, and its type."""
    return f"{' '.join(repr(value).split()):.80} ({type(value).__name__})"


def require_kinds(given: Mapping[str, Any], annotated: Callable[..., Any], several: Collection[str] = ()) -> None:
    """Raises ConfigError that names each value that is not of its annotation in a function or class.

    An argument among `several` holds all that was given of one.
    """
    problems, kinds = Problems(f"{annotated.__name__} cannot be called so"), _annotations(annotated)
    for name, value in given.items():
        for message in _misfits(name, value, kinds.get(name, Any), several=name in several):
            problems.add(message)
    problems.raise_if_any()


@cache
def _annotations(annotated: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(annotated)


def _misfits(name: str, value: Any, kind: Any, *, several: bool) -> Iterator[str]:
    """A message for each value of an argument that is not of `kind`; those of a list or a dict one by one."""
    if not several and _fits(value, kind):
        return
    wrong = [(name, value)]
    held = (Mapping,) if isinstance(value, Mapping) else (Sequence, tuple) if isinstance(value, (list, tuple)) else ()
    for arm in () if several else _arms(kind):
        if typing.get_origin(arm) in held:
            several, kind = True, next(inner for inner in reversed(typing.get_args(arm)) if inner is not ...)
    if several:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        wrong = [(f"{name}[{place!r}]", one) for place, one in items if not _fits(one, kind)]
    *others, last = dict.fromkeys(_WORDS.get(arm.__name__, arm.__name__) for arm in map(_class_of, _arms(kind)))
    expected = f"{', '.join(others)} or {last}" if others else last
    yield from (f"{where} is {given_as(one)}; expected {expected}." for where, one in wrong)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotation. What is no list may stand for one, such as a column of a table."""
    arms = _arms(kind)
    if len(arms) > 1:
        return any(_fits(value, arm) for arm in arms)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or origin is Literal:
        return True
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(one, inner[1]) for one in value.values())
    if origin in (Sequence, tuple):
        if isinstance(value, (list, tuple)):
            return all(_fits(one, inner[0]) for one in value)
        return origin is Sequence and isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return callable(value) if origin is Callable else isinstance(value, _class_of(kind))


def _arms(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union; of any other that alone."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return (kind,)
    return tuple(inner for arm in typing.get_args(kind) for inner in _arms(arm))


def _class_of(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


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

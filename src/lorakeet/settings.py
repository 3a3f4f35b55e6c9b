"""Mappings of text to trees of frozen dataclasses and back: every problem found at once, unknown names answered with the nearest.

Command-line flags, the reference page and the saved run file are all made from `fields_of`. Field types: bool, int, float,
str, Path, `X | None`, `tuple[X, ...]`, `dict[str, X]`, `Literal[...]` of strings, or another such dataclass. A field of
dataclass type with metadata `{"shorthand": "path"}` may be given as one plain text, which then stands for that inner field.

Text is read as the declared type, so that flags and YAML follow one rule: "8" is a whole number, "1e-3" a number, "true" a
truth value, "none" is None where None is allowed, "a,b" two items of a list, "q_proj=8,v_proj=4" or JSON a mapping.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lorakeet.errors import ConfigError, LorakeetError, Problems, nearest
from lorakeet.setting import Removed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "TRUTH_WORDS", "Setting", "choices", "describe", "fields_of", "load", "override", "removed_from", "require_types",
    "shown_default", "to_mapping",
]  # fmt: skip

T = TypeVar("T", bound="DataclassInstance")

_LONGEST_SHOWN = 200  # characters of a value in a message
_MOST_SHOWN = 40  # problems of a file, of which the others are counted
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_TRUTH: dict[str | bool, bool] = {True: True, "true": True, "yes": True, "on": True}
_TRUTH |= {False: False, "false": False, "no": False, "off": False}
TRUTH_WORDS = {*(word for word in _TRUTH if isinstance(word, str)), "none", "null"}  # all that a truth value may be, or unset
_COMMA = re.compile(r"[+-]?\d+,\d+")  # a number as many languages write it
_SEEN = {**_PLAIN, list: "a list", tuple: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Setting:
    """One leaf of a tree of settings, with all that a flag, a form field or a line of the reference needs."""

    path: str  # dotted, such as "lora.rank"
    kind: Any  # its type annotation
    default: Any  # dataclasses.MISSING when a value must be given
    help: str
    shorthand: str = ""  # the shorter path that also means this leaf, such as "model" for "model.path"

    @property
    def section(self) -> str:
        """The dotted path of the dataclass that holds this leaf; empty at the top."""
        return self.path.rpartition(".")[0]


def fields_of(cls: type[DataclassInstance], prefix: str = "") -> tuple[Setting, ...]:
    """Every leaf below `cls` in the order of the source, dotted paths and all."""
    found: list[Setting] = []
    for name, kind, spec in _fields(cls):
        path = f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            inner = fields_of(typing.cast("type[DataclassInstance]", kind), f"{path}.")
            short = f"{path}.{spec.metadata.get('shorthand', '')}"
            found += [dataclasses.replace(leaf, shorthand=path) if leaf.path == short else leaf for leaf in inner]
        else:
            found.append(Setting(path, kind, _default(spec), str(spec.metadata.get("help", ""))))
    return tuple(found)


def removed_from(cls: type[DataclassInstance], prefix: str = "") -> dict[str, Removed]:
    """The settings of earlier versions below `cls`, by their dotted paths."""
    found = {f"{prefix}{name}": one for name, one in getattr(cls, "REMOVED", {}).items()}
    for name, kind, _ in _fields(cls):
        if dataclasses.is_dataclass(kind):
            found |= removed_from(typing.cast("type[DataclassInstance]", kind), f"{prefix}{name}.")
    return found


def load(cls: type[T], mapping: Mapping[str, Any], *, where: str, origins: Mapping[str, str] | None = None) -> T:
    """An instance of `cls` from nested mappings; what is not given keeps its default.

    `where` names the source in messages ("drug.yaml"); `origins` names another source for single dotted paths
    ("lora.rank" → "flag --lora.rank"). Each dataclass may have `validate()`, which returns its problems as a list of
    messages or raises them as a ConfigError; they join the others.

    Raises ConfigError that lists every problem: unknown keys, wrong types, missing values, and what `validate` finds.
    """
    reader = _Reader(where, origins or {})
    instance = reader.build(cls, mapping, "")
    reader.problems.raise_if_any()
    return typing.cast("T", instance)  # None only after a problem, which has been raised


def to_mapping(instance: DataclassInstance) -> dict[str, Any]:
    """Nested dicts, lists and plain values, in the order of the fields; `load` reads them back to an equal instance."""
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def override(cls: type[DataclassInstance], mapping: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `mapping` in which the dotted `path` is `value`; a shorthand text in the way is spelt out first."""
    head, _, rest = path.partition(".")
    changed = dict(mapping)
    kind, spec = next(((kind, spec) for name, kind, spec in _fields(cls) if name == head), (None, None))
    if spec is None or not dataclasses.is_dataclass(kind):
        return {**changed, path: value}
    shorthand = spec.metadata.get("shorthand")
    inner = changed.get(head) or {}
    if isinstance(inner, str) and shorthand:
        inner = {shorthand: inner}
    if isinstance(inner, Mapping):  # anything else is left in place for `load` to complain about
        changed[head] = override(typing.cast("type[DataclassInstance]", kind), inner, rest or shorthand or "", value)
    return changed


def describe(kind: Any) -> str:
    """What a field of this type expects, in words: "a whole number", "one of 'bf16', 'fp32'", "text, or none"."""
    arms = _arms(kind)
    if len(arms) > 1 or arms[0] is not kind:
        return " or ".join(map(describe, arms)) + (", or none" if _allows_none(kind) and "none" not in choices(kind) else "")
    if choices(kind):
        return "one of " + ", ".join(repr(choice) for choice in choices(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list ({describe(typing.get_args(kind)[0])} each)"
    if typing.get_origin(kind) is dict:
        return f"a mapping from names ({describe(typing.get_args(kind)[1])} each)"
    return _PLAIN.get(kind, getattr(kind, "__name__", str(kind)))


def choices(kind: Any) -> tuple[str, ...]:
    """The texts that a Literal type allows, also inside `Literal[...] | None`; empty for other types."""
    return tuple(choice for arm in _arms(kind) if typing.get_origin(arm) is Literal for choice in typing.get_args(arm))


def shown_default(value: Any) -> str:
    """Returns a default value as it would be typed."""
    if value is None or value in ("", (), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        plain = not any(re.search(r"[,=]|^[\s{]|\s$", str(word)) for pair in value.items() for word in pair)
        return ",".join(f"{name}={item}" for name, item in value.items()) if plain else json.dumps(value, ensure_ascii=False)
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)


def require_types(instance: DataclassInstance) -> None:
    """Raises ConfigError for a value that is not of its field's type: what Python code gives is not read from a text."""
    reader = _Reader(f"lk.{type(instance).__name__.removesuffix('Spec')}", {})
    for name, kind, _ in _fields(type(instance)):
        value = getattr(instance, name)
        if dataclasses.is_dataclass(kind):
            continue
        endless = isinstance(value, float) and not math.isfinite(value)  # a number, on which `validate` says more
        try:
            misfit = isinstance(_read(kind, 0.5 if endless else value), (bool, int, float)) and isinstance(value, str)
        except _Misfit:
            misfit = True
        if misfit:
            reader.misfit(name, value, describe(kind), choices(kind))
    reader.problems.raise_if_any()


class _Misfit(ValueError):
    """A value that cannot be read as the declared type."""


class _Reader:
    """Walks a mapping along a dataclass and collects every problem on the way."""

    def __init__(self, where: str, origins: Mapping[str, str]) -> None:
        self.where = where
        self.origins = origins
        self.problems = Problems(f"{where} cannot be used", shown=_MOST_SHOWN)
        self.paths: tuple[str, ...] = ()

    def build(self, cls: type[T], mapping: Any, prefix: str) -> T | None:
        if not prefix:
            self.paths = tuple(leaf.path for leaf in fields_of(cls))
        if not isinstance(mapping, Mapping):
            self.misfit(prefix.rstrip(".") or "The whole", mapping, "a mapping with keys " + _listed(_names(cls)))
            return None
        names, removed = _names(cls), getattr(cls, "REMOVED", {})
        for key in mapping:
            if key in removed:
                self.removed(f"{prefix}{key}", mapping[key], removed[key])
            elif key not in names:
                self.unknown(str(key), names, prefix)
        values: dict[str, Any] = {}
        complete = True
        for name, kind, spec in _fields(cls):
            path = f"{prefix}{name}"
            if name in mapping or dataclasses.is_dataclass(kind):
                value, good = self.value(kind, spec, mapping.get(name), path)
            else:
                value, good = _default(spec), True
                if value is MISSING:
                    good = False
                    help_text = spec.metadata.get("help", "")
                    message = f"{path} is missing in {self.where}; expected {describe(kind)}. {help_text}".rstrip()
                    self.problems.add(message, code="setting-missing", values={"setting": path, "expected": describe(kind)})
            values[name] = value
            complete = complete and good
        return self.finish(cls, values, prefix.rstrip(".")) if complete else None

    def value(self, kind: Any, spec: dataclasses.Field[Any], given: Any, path: str) -> tuple[Any, bool]:
        if dataclasses.is_dataclass(kind):
            shorthand = spec.metadata.get("shorthand")
            if isinstance(given, str) and shorthand:
                given = {shorthand: given}
            before = len(self.problems.errors)
            built = self.build(typing.cast("type[DataclassInstance]", kind), {} if given is None else given, f"{path}.")
            return built, len(self.problems.errors) == before
        try:
            return _read(kind, given), True
        except _Misfit:
            self.misfit(path, given, describe(kind), choices(kind))
            return None, False

    def finish(self, cls: type[T], values: dict[str, Any], section: str) -> T:
        instance = cls(**values)
        validate = getattr(instance, "validate", None)
        found: Iterable[str | LorakeetError]
        try:
            found = (validate() or ()) if validate else ()
        except ConfigError as error:
            found = error.problems or (error,)
        for one in (str(one) if isinstance(one, LorakeetError) and one.code == one.CODE else one for one in found):
            self.problems.add(one, code="setting-out-of-range", values={"section": section})
        return instance

    def misfit(self, path: str, given: Any, expected: str, known: tuple[str, ...] = ()) -> None:
        seen = "empty" if given is None else f"{_shown(given)} ({_SEEN.get(type(given), type(given).__name__)})"
        hint = nearest(given, known) if isinstance(given, str) else ""
        if expected.startswith("a number") and isinstance(given, str) and _COMMA.fullmatch(given.strip()):
            hint = f" Write {given.strip().replace(',', '.')}, with a point."
        message = f"{path} {self.source(path)} is {seen}; expected {expected}.{hint}"
        values = {"setting": path, "value": _plain_value(given), "expected": expected}
        self.problems.add(message, code="setting-wrong-type", values=values)

    def unknown(self, key: str, names: tuple[str, ...], prefix: str) -> None:
        key = key[:_LONGEST_SHOWN]
        path = f"{prefix}{key}"
        near = [f"{prefix}{one}" for one in difflib.get_close_matches(key, names, n=1)]
        if not near:
            leaf = key.rpartition(".")[2]
            by_leaf = {known.rpartition(".")[2]: known for known in reversed(self.paths)}
            near = [by_leaf[one] for one in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.8)]
        hint = f"Did you mean '{near[0]}'?" if near else f"Known keys here: {_listed(names)}."
        values = {"setting": path, "nearest": "".join(near)}
        self.problems.add(f"Unknown key '{path}' {self.source(path)}. {hint}", code="setting-unknown", values=values)

    def removed(self, path: str, given: Any, setting: Removed) -> None:
        if setting.same and given not in setting.same:
            message = f"{path} {self.source(path)} is {_shown(given)}. {setting.why} Leave it out."
            self.problems.add(message, code="setting-removed", values={"setting": path, "value": _plain_value(given)})

    def source(self, path: str) -> str:
        return f"({self.origins[path]})" if path in self.origins else f"in {self.where}"


def _plain_value(value: Any) -> Any:
    """A value for JSON: as it is if it is short and plain, else as a message shows it."""
    if isinstance(value, str):
        return value[:_LONGEST_SHOWN]
    return value if value is None or isinstance(value, (bool, int, float)) else _shown(value)


def _shown(value: Any) -> str:
    """A value for a message, truncated."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _fields(cls: type[DataclassInstance]) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    hints = typing.get_type_hints(cls)  # at each reading: a registered kind adds names
    for spec in dataclasses.fields(cls):
        if spec.init:
            yield spec.name, hints[spec.name], spec


def _names(cls: type[DataclassInstance]) -> tuple[str, ...]:
    return tuple(spec.name for spec in dataclasses.fields(cls) if spec.init)


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return spec.default


def _listed(names: tuple[str, ...], most: int = 12) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _arms(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(arm for arm in typing.get_args(kind) if arm is not type(None))
    return (kind,)


def _allows_none(kind: Any) -> bool:
    return type(None) in typing.get_args(kind) and typing.get_origin(kind) in (typing.Union, types.UnionType)


def _read(kind: Any, value: Any) -> Any:
    """`value` as `kind`; raises _Misfit."""
    means_none = value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    if means_none and _allows_none(kind) and value not in choices(kind):
        return None
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for arm in _arms(kind):
            try:
                return _read(arm, value)
            except _Misfit:
                continue
        raise _Misfit
    if origin is Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        raise _Misfit
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise _Misfit
        return tuple(_read(typing.get_args(kind)[0], item) for item in value)
    if origin is dict:
        return _read_dict(typing.get_args(kind)[1], value)
    return _read_scalar(kind, value)


def _read_dict(item_kind: Any, value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _Misfit from None
    if isinstance(value, str):
        pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
        if not all(name and sign for name, sign, _ in pairs):
            raise _Misfit
        value = {name.strip(): text.strip() for name, _, text in pairs}
    if not isinstance(value, Mapping):
        raise _Misfit
    return {str(name): _read(item_kind, item) for name, item in value.items()}


def _read_scalar(kind: Any, value: Any) -> Any:
    if kind is bool:
        word = value.strip().lower() if isinstance(value, str) else value
        truth = _TRUTH.get(word) if isinstance(word, (str, bool)) else None
        if truth is None:
            raise _Misfit
        return truth
    if kind in (int, float):
        return _read_number(kind, value)
    if isinstance(value, bool) or not isinstance(value, (str, int, Path)):
        raise _Misfit  # a number such as 1.10 would lose its last digit as text, so only whole numbers pass
    return Path(str(value)) if kind is Path else str(value)


def _read_number(kind: type[int] | type[float], value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _Misfit
    try:
        if kind is int and not isinstance(value, float):
            return int(value)
    except ValueError:
        pass  # "1e3" is whole too: read it as a number below
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Misfit from None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise _Misfit
    return int(number) if kind is int else number

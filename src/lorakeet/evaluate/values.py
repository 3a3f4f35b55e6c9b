"""Converts frozen dataclasses to JSON and back, for the files of a run folder.

JSON has no infinity and no NaN; they are written as the strings "inf", "-inf", "nan".
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorakeet.disk import write_whole
from lorakeet.errors import DataError, nearest

T = TypeVar("T")
_WHOLE = 1 << 63  # above every whole number that is written


def encode(value: Any) -> Any:
    """Converts `value` to JSON types; dataclasses become objects, tuples become arrays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key(field): encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"Cannot write {type(value).__name__} as JSON; expected dataclasses, tuples, mappings, numbers and text.")


def decode(kind: type[T], data: Any, *, where: str = "") -> T:
    """The inverse of `encode` for a value of type `kind`. Raises DataError that names unknown and missing keys."""
    result: T = _decode(kind, data, where or kind.__name__)
    return result


def to_text(value: Any) -> str:
    """JSON text of `value`, indented, with a trailing newline."""
    return json.dumps(encode(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def put_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically. Raises OSError if the system refuses."""
    write_whole(path, text.encode("utf-8"))


def from_text(kind: type[T], text: str, *, where: str) -> T:
    """Parses a value of type `kind`. Raises DataError that names `where` and the line of an error."""
    try:
        data = json.loads(text)
        if "\\u" in text:  # half of a character, as JSON can escape it, could be written nowhere again
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # a plain ValueError for a number of thousands of digits
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON: {place}. Write it again with the same command.") from error
    return decode(kind, data, where=where)


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is Literal:
        if data not in arguments:
            raise DataError(f"{where} is {data!r}; expected one of {', '.join(map(repr, arguments))}.")
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if origin is tuple:  # all tuples here are tuple[kind, ...]
        _expect(data, list, where)
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin in (dict, Mapping):
        _expect(data, dict, where)
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float:
        return _decode_float(data, where)
    if kind is not Any:
        _expect(data, kind, where)
    if kind is int and abs(data) >= _WHOLE:
        raise DataError(f"{where} has {len(str(abs(data)))} digits; expected a whole number below 2^63.")
    return data


def _decode_union(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _decode(kind, data, where)
        except DataError:
            continue
    return _decode(kinds[-1], data, where)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(data, dict, where)
    hints = get_type_hints(kind)
    fields = {_key(field): field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise DataError(f"{where} has an unknown key '{key}'; expected {', '.join(fields)}.{nearest(key, fields)}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in data:
            raise DataError(f"{where} lacks the key '{key}'; it was truncated or written by another program.")
    names = {key: field.name for key, field in fields.items()}
    values = {names[key]: _decode(hints[names[key]], item, f"{where}.{key}") for key, item in data.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise DataError(f"{where} cannot be used: {error}. It was edited or damaged: put back what was written.") from error


def _key(field: dataclasses.Field[Any]) -> str:
    """The JSON key of a field: its name, or the "key" of its metadata."""
    return str(field.metadata.get("key", field.name))


def _decode_float(data: Any, where: str) -> float:
    if isinstance(data, str) and data in ("inf", "-inf", "nan"):
        return float(data)
    if isinstance(data, bool) or not isinstance(data, (int, float)):
        raise DataError(f"{where} is {data!r}; expected a number.")
    try:
        return float(data)
    except OverflowError:
        raise DataError(f"{where} has {len(str(abs(data)))} digits; expected a number that fp64 can hold.") from None


def _expect(data: Any, kind: type, where: str) -> None:
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise DataError(f"{where} is {data!r}; expected {kind.__name__}.")

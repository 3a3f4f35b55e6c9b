"""Reads a JSON file of one object, with a message for anything else in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakeet.disk import LARGEST_READ, read_regular
from lorakeet.errors import DataError, unreadable


def read_object(path: Path, *, expected: str) -> dict[str, Any]:
    """The object in `path`. DataError if it cannot be read or is something else; `expected` says what should be there."""
    return parse_object(read_bytes(path, expected=expected), path, expected=expected)


def read_bytes(path: Path, *, expected: str, most: int = LARGEST_READ) -> bytes:
    """The bytes of `path`; DataError if it cannot be read, or has more than `most`."""
    try:
        return read_regular(path, most)
    except OSError as error:
        raise DataError(f"{unreadable(path, error)} Expected {expected}.") from error


def parse_object(raw: bytes | str, path: object, *, expected: str) -> dict[str, Any]:
    """Parses `raw`, the content of `path` (a file, or a part of one in words). DataError if it is no object."""
    try:
        data = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # a plain ValueError for a number of thousands of digits
        raise DataError(f"{path} is not JSON that can be read: {error}. Expected {expected}.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a JSON {type(data).__name__}; expected {expected}.")
    return data

"""Values that processes of one planner pass on: each plan is made by a process of its own, and later ones need not compute them.

A key is a text with all that the value depends on. Outside of `remembering` nothing is kept: a command computes all of its plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")
Values = MutableMapping[str, Any]
Pass = Callable[[str, Any], None]


@dataclass(frozen=True)
class _Known:
    """What earlier processes have found, and how a value is passed to later ones."""

    values: Values
    pass_on: Pass


_known: ContextVar[_Known | None] = ContextVar("_known", default=None)


@contextmanager
def remembering(values: Values, pass_on: Pass) -> Iterator[None]:
    """A context in which `values` are known, and `pass_on` is called with the key and the value of each new one."""
    before = _known.set(_Known(values, pass_on))
    try:
        yield
    finally:
        _known.reset(before)


@contextmanager
def passing_nothing_on() -> Iterator[None]:
    """A context in which what is known stays known, and new values end with this process: for one that shares its pipe."""
    known = _known.get()
    if known is None:
        yield
        return
    with remembering(known.values, lambda key, value: None):
        yield


def recall(key: str) -> Any:
    """The value that an earlier process has kept; None if there is none."""
    known = _known.get()
    return None if known is None else known.values.get(key)


def keep(key: str, value: Any) -> None:
    """Keeps a value for later processes; nothing outside of `remembering`."""
    if (known := _known.get()) is not None:
        known.values[key] = value
        known.pass_on(key, value)


def key_of(parts: Callable[[], tuple[object, ...]]) -> str:
    """The key of what depends on nothing but `parts()`, by their `repr`; "", which no value has, outside of `remembering`."""
    return "" if _known.get() is None else hashlib.sha256(repr(parts()).encode()).hexdigest()


def remembered(parts: Callable[[], tuple[object, ...]], compute: Callable[[], Value]) -> Value:
    """The value of `compute()`, which depends on nothing but `parts()`; their `repr` is the key. What it raises is not kept."""
    if _known.get() is None:
        return compute()
    key = key_of(parts)
    found: Value | None = recall(key)
    if found is None:
        found = compute()
        keep(key, found)
    return found


def state_of(path: Path | str | None) -> tuple[object, ...]:
    """What changes whenever a file does: its path, size and time; of a folder those of its files."""
    if path is None:
        return ()
    place = Path(path).expanduser()
    try:
        found = sorted(place.iterdir()) if place.is_dir() else [place]
        return (str(place), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found))
    except OSError:
        return (str(path),)

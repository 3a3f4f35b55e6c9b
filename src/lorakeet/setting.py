"""One setting of a run file or a verb: a field of a frozen dataclass, with its default and its help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

Default = TypeVar("Default")


def setting(default: Default, text: str) -> Default:
    """A dataclass field with this default, and `text` as the help that flags and the reference show."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Removed:
    """A setting of earlier versions, in the REMOVED of its section.

    Run files may still have one of `same`, with which an earlier version did what this one does; without `same`, any value.
    """

    same: tuple[Any, ...]
    why: str  # it is gone, in a sentence
    instead: str = ""  # the name of the setting that replaces it

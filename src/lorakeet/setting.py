"""One setting of a run file or a verb: a field of a frozen dataclass, with its default and its help. Imports no torch."""

from __future__ import annotations

from dataclasses import field
from typing import TypeVar

Default = TypeVar("Default")


def setting(default: Default, text: str) -> Default:
    """A dataclass field with this default, and `text` as the help that flags and the reference show."""
    return field(default=default, metadata={"help": text})

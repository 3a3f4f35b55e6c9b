"""A row of data, independent of the file and shape that it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

PROMPT_GROUP = "prompt "  # what the groups of rows with one prompt begin with
SHOWN = 5  # places of rows that a message names


@dataclass(frozen=True)
class Turn:
    """One speaker's text.

    `role` is "system", "user", "assistant" or "tool", or "" for raw text, which never goes through a chat template.
    `free` is the span (start, end) of `text` that came from the data; a prompt template added the rest. Only the free span
    is compared between rows, and only it is shortened when a row is too long. `extra` are the message's other keys for the
    template, as JSON text: tool_calls, tool_call_id and name.
    """

    role: str
    text: str
    supervised: bool
    free: tuple[int, int] | None = None
    extra: str = ""

    @property
    def free_text(self) -> str:
        """The part of the text that came from the data."""
        return self.text if self.free is None else self.text[self.free[0] : self.free[1]]


@dataclass(frozen=True)
class Row:
    """A conversation, a prompt with its completion, a labelled text or a raw text.

    `source` is its place, as "file.tsv:17"; rows of one `group` stay on one side of a split. `tools` are the descriptions of
    callable functions for the chat template, as JSON text. A row of compared answers has a second one, in `rejected`: the same
    turns with another end. `desirable` says whether the answer of a row of KTO's is wanted.
    """

    turns: tuple[Turn, ...]
    label: str | None
    group: str | None
    source: str
    tools: str = ""
    rejected: tuple[Turn, ...] = ()
    desirable: bool | None = None

    @cached_property
    def key(self) -> str:
        """SHA-256 of the content, independent of file, row order, prompt template and system prompt."""
        content: list[Any] = [self._said(self.turns), self.label, *([self.tools] if self.tools else [])]
        if self.desirable is not None:
            content.append({"desirable": self.desirable})
        elif self.rejected:
            content.append({"rejected": self._said(self.rejected)})
        canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    def _said(self, turns: Sequence[Turn]) -> list[list[str]]:
        return [
            [turn.role, turn.free_text, *([turn.extra] if turn.extra else [])]
            for turn in turns if turn.role != "system" and not self._is_label(turn)
        ]  # fmt: skip

    @property
    def other(self) -> Row | None:
        """The row with the rejected answer in place of the chosen one; None without one."""
        return replace(self, turns=self.rejected, rejected=(), desirable=None) if self.rejected else None

    @property
    def answered(self) -> bool:
        """True if the last turn is an answer, which can be written anew."""
        return self.turns[-1].supervised and bool(self.turns[-1].role)

    @cached_property
    def text(self) -> str:
        """The text that leak checks compare: the user's turns without template, or all raw text."""
        return "\n".join(turn.free_text for turn in self.turns if turn.role in ("user", ""))

    def _is_label(self, turn: Turn) -> bool:
        return turn.supervised and self.label is not None


def some_sources(sources: Sequence[str]) -> str:
    """The first SHOWN places of rows, and how many more there are, in words."""
    return ", ".join(sources[:SHOWN]) + (f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else "")


def row_groups(rows: Sequence[Row]) -> tuple[str, ...] | None:
    """The group of each row, or its own source; None if no row has a group."""
    return tuple(row.group or row.source for row in rows) if any(row.group for row in rows) else None


def common_turns(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """How many turns both begin with; the last turn of each is an answer of its own."""
    both = zip(one[:-1], other[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], both))

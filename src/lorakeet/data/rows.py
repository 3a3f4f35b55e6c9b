"""A row of data as every other part of the package sees it, whatever file and shape it came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Turn:
    """One speaker's text.

    `role` is "system", "user" or "assistant", or "" for raw text that never goes through a chat template.
    `free` is the part of `text` (start, end) that came from the data; the rest was put around it by a prompt
    template. Only the free part is compared between rows, and only it is shortened when a row is too long.
    """

    role: str
    text: str
    supervised: bool
    free: tuple[int, int] | None = None

    @property
    def free_text(self) -> str:
        """The part of the text that came from the data."""
        return self.text if self.free is None else self.text[self.free[0] : self.free[1]]


@dataclass(frozen=True)
class Row:
    """A conversation, a prompt with its completion, a labelled text or a raw text.

    `source` says where it stands, as "file.tsv:17"; `group` names rows that must stay on one side of a split.
    """

    turns: tuple[Turn, ...]
    label: str | None
    group: str | None
    source: str

    @cached_property
    def key(self) -> str:
        """Sha256 of the content: it does not depend on file, row order, prompt template or system prompt."""
        said = [[turn.role, turn.free_text] for turn in self.turns if turn.role != "system" and not self._is_label(turn)]
        canonical = json.dumps([said, self.label], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def text(self) -> str:
        """The content that leak checks compare: what the user says, without template; for raw text, all of it."""
        return "\n".join(turn.free_text for turn in self.turns if turn.role in ("user", ""))

    def _is_label(self, turn: Turn) -> bool:
        return turn.supervised and self.label is not None

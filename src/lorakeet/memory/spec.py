"""How much memory a run may take: `MemorySpec`, the `memory:` part of a run file. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorakeet.errors import ConfigError
from lorakeet.memory.budget import parse_budget


@dataclass(frozen=True)
class MemorySpec:
    """A budget that the run keeps, and where frozen weights lie that do not fit into it."""

    budget: str = field(
        default="",
        metadata={
            "help": "The most memory that the process may hold, such as 2GiB; weights that do not fit are streamed from disk."
        },
    )
    store: str = field(
        default="", metadata={"help": "Folder for the store of streamed weights; left out, one in the cache folder."}
    )

    @property
    def bytes(self) -> int | None:
        """The budget in bytes, or None for no limit; ConfigError where it is none."""
        return parse_budget(self.budget) if self.budget else None

    def validate(self) -> list[str]:
        """Every problem of these settings in words."""
        try:
            _ = self.bytes
        except ConfigError as error:
            return [str(error)]
        return []

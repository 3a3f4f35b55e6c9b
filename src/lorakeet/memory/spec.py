"""How much memory a run may take: `MemorySpec`, the `memory:` part of a run file. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from lorakeet.errors import ConfigError
from lorakeet.memory.budget import Budget


@dataclass(frozen=True)
class MemorySpec:
    """A budget that the run keeps, and where frozen weights lie that do not fit into it."""

    budget: str = field(
        default="",
        metadata={
            "help": "The most memory the process may hold, such as 2GiB: of a CUDA device where the model is on one. What does "
            "not fit is streamed."
        },
    )
    store: str = field(
        default="", metadata={"help": "Folder for the store of streamed weights; left out, one in the cache folder."}
    )

    keep: Literal["disk", "host"] = field(
        default="disk",
        metadata={
            "help": "From where blocks are streamed to a CUDA device: disk, or host, in whose pinned memory they stay once read."
        },
    )

    @cached_property
    def limit(self) -> Budget:
        """The budget as a value, parsed once. Raises ConfigError where it is not a size."""
        return Budget.parse(self.budget or None)

    def validate(self) -> list[str]:
        """Every problem of these settings in words."""
        try:
            _ = self.limit
        except ConfigError as error:
            return [str(error)]
        return []

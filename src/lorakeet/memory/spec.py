"""`MemorySpec`, the `memory` part of a run file: the memory budget. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lorakeet.errors import ConfigError
from lorakeet.memory.budget import Budget
from lorakeet.setting import setting
from lorakeet.settings import require_types


@dataclass(frozen=True)
class MemorySpec:
    """The memory budget of a run, and where frozen weights are stored that do not fit."""

    budget: str = setting(
        "", "Memory budget, such as 2GiB, of the process or of its CUDA device; weights that do not fit are streamed."
    )
    store: str = setting("", "Folder for streamed weights; by default one in the cache folder.")

    keep: Literal["auto", "disk", "host"] = setting(
        "auto",
        "Where blocks of a CUDA device come from: disk, or pinned memory of the host, which auto takes if enough is free.",
    )

    @cached_property
    def limit(self) -> Budget:
        """The budget as a value, parsed once. Raises ConfigError where it is not a size."""
        return Budget.parse(self.budget or None)

    def __post_init__(self) -> None:
        require_types(self)

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        try:
            _ = self.limit
        except ConfigError as error:
            return [str(error)]
        return []

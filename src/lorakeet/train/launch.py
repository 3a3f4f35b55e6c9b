"""The rank of this process, from the environment variables of torchrun. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 29500  # torchrun's default rendezvous port
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # required by torch's env:// rendezvous


@dataclass(frozen=True)
class Launch:
    """Process `rank` of `count`, and `local_rank` of the `local_count` on this machine; a single process without torchrun."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    address: str = ""  # of the first process's machine

    @property
    def first(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """The command line that starts `lorakeet` in the same way."""
        if self.count == 1:
            return "lorakeet"
        nodes = -(-self.count // self.local_count)
        meet = f"--rdzv-backend c10d --rdzv-endpoint {self.address or 'FIRST_MACHINE'}:{PORT}"
        many = f" --nnodes {nodes} {meet}" if nodes > 1 else ""
        return f"torchrun{many} --nproc-per-node {self.local_count} -m lorakeet"


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """Reads a Launch from `environment` (default: of this process)."""
    found = os.environ if environment is None else environment
    if any(not found.get(name) for name in _NEEDED) or found["WORLD_SIZE"] == "1":
        return Launch()
    rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
    local = int(found.get("LOCAL_RANK") or rank), int(found.get("LOCAL_WORLD_SIZE") or count)
    return Launch(rank, count, *local, found["MASTER_ADDR"])

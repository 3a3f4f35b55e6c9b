"""Which of several processes this one is, as torchrun tells each through the environment. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 29500  # at which the machines of a run meet, by torchrun's own default
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # without one of these torch could not bring them together


@dataclass(frozen=True)
class Launch:
    """Process `rank` of `count`, and `local_rank` of the `local_count` on this machine; alone unless torchrun says otherwise."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    address: str = ""  # of the first process's machine

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """What the command `lorakeet` is called when it is started so again."""
        if self.count == 1:
            return "lorakeet"
        nodes = -(-self.count // self.local_count)
        meet = f"--rdzv-backend c10d --rdzv-endpoint {self.address or 'FIRST_MACHINE'}:{PORT}"
        many = f" --nnodes {nodes} {meet}" if nodes > 1 else ""
        return f"torchrun{many} --nproc-per-node {self.local_count} -m lorakeet"


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """What the `environment` (of this process when None) says, in the words that torchrun and torch's env:// use."""
    found = os.environ if environment is None else environment
    if any(not found.get(name) for name in _NEEDED) or found["WORLD_SIZE"] == "1":
        return Launch()
    rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
    local = int(found.get("LOCAL_RANK") or rank), int(found.get("LOCAL_WORLD_SIZE") or count)
    return Launch(rank, count, *local, found["MASTER_ADDR"])

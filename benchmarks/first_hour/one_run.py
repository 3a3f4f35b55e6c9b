"""One `lorakeet` command on a GPU that is capped: `python -m first_hour.one_run BYTES ARGUMENTS…` (0: not capped).

Free memory is what the cap leaves, and torch allocates no more: what a smaller GPU would do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lorakeet.cli.main import main as command


def main(arguments: Sequence[str]) -> None:
    cap = int(arguments[0])
    if cap:
        _cap(cap)
    sys.exit(command(list(arguments[1:])))


def _cap(cap: int) -> None:
    """Bounds torch's allocator, and what torch says is free, to a GPU of so many bytes."""
    free_of, (_, total) = torch.cuda.mem_get_info, torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))

    def capped(device: object = None) -> tuple[int, int]:
        free, _ = free_of(device)  # type: ignore[arg-type]
        return max(0, free - (total - cap)), cap

    torch.cuda.mem_get_info = capped


if __name__ == "__main__":
    main(sys.argv[1:])

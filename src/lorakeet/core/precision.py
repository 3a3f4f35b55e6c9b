"""In which dtype matrix products are fastest on this machine, given how the weights are stored. Measured, not assumed.

Some processors announce bf16 products that are slower than their fp32 ones (seen: a 2-core Intel Xeon with AVX512_BF16,
88 against 165 GFLOP/s a core; an AMD EPYC with the same feature has bf16 twice as fast as fp32). Casting a bf16 weight up
for each product costs a tenth of the product, so storage and products are two choices: bf16 storage halves the memory,
and fp32 products lose nothing in exactness.
"""

from __future__ import annotations

import time
from functools import cache

import torch

PROBE_SIZE = 768  # a square product of this size takes a few milliseconds: long against the clock, short for a user
PROBE_REPEATS = 7
CLEARLY_FASTER = 1.15  # below this ratio the stored dtype is kept, since casting costs about a tenth


def fastest_products(stored: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """`stored` or float32, whichever multiplies faster for weights kept as `stored`; on a GPU always `stored`.

    Takes 50 to 100 ms on a CPU at the first call of a process: the best of seven alternated products each. The answer belongs
    into the run's saved settings, so that a resumed run computes the same numbers.
    """
    if torch.device(device).type != "cpu" or stored == torch.float32:
        return stored
    return _measured(stored, torch.get_num_threads())


@cache
def _measured(stored: torch.dtype, threads: int) -> torch.dtype:
    """The faster of the two on this CPU with that many threads, which torch has."""
    narrow = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=stored)
    wide = narrow.float()
    seconds = {stored: float("inf"), torch.float32: float("inf")}
    for _ in range(PROBE_REPEATS):
        for operand in (narrow, wide):
            start = time.perf_counter()
            torch.mm(operand, operand)
            seconds[operand.dtype] = min(seconds[operand.dtype], time.perf_counter() - start)
    return torch.float32 if seconds[torch.float32] * CLEARLY_FASTER < seconds[stored] else stored

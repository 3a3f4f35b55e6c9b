"""How often the fuzz tests draw: fixed cases in the usual tests; many random ones with LORAKEET_FUZZ=1, a tenth with 0.1."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

IN_MEMORY = "/dev/shm"
MANY = float(os.environ.get("LORAKEET_FUZZ") or 0)  # the share of the many cases that is drawn


def fuzzed(quick: int, many: int) -> Callable[[Any], Any]:
    """Marks a test of Hypothesis: `quick` fixed cases, the same each time; `many` random ones under `make fuzz`.

    A failure prints the case, to be kept with `@example`.
    """
    drawn = settings(
        max_examples=max(1, round(many * MANY)) if MANY else quick, derandomize=not MANY, deadline=None, database=None,
        print_blob=bool(MANY),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def marked(test: Any) -> Any:
        long_cases = pytest.mark.filterwarnings("ignore:Generating overly large repr")
        return long_cases(pytest.mark.fuzz(drawn(test)))

    return marked


@contextmanager
def case_folder() -> Iterator[Path]:
    """A new folder for one case, in memory where the system has such a place: one on a disk takes longer than many a case."""
    with TemporaryDirectory(dir=IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None) as name:
        yield Path(name)

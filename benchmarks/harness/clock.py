"""The time that an action takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def milliseconds(action: Callable[[], object]) -> float:
    """How long `action` takes, by the wall clock."""
    began = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - began)

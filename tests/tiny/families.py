"""Cases that walk the same lines as others: `make families` tries them, the usual tests do not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

ALL = os.environ.get("LORAKEET_FAMILIES", "") not in ("", "0")


def usual(cases: Iterable[Any], every: Iterable[Any] = ()) -> list[Any]:
    """The cases of the usual tests; under LORAKEET_FAMILIES=1 the others of `every` too, marked as of `make families`."""
    few = list(cases)
    rest = [case for case in every if case not in few] if ALL else []
    return [*few, *(pytest.param(*case, marks=pytest.mark.families) for case in rest)]

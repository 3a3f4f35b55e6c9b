"""Parsed sources, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from structure.tree import nodes_of, parsed


@pytest.fixture(scope="package", autouse=True)
def parsed_once() -> Iterator[None]:
    """Each file is parsed once in a process; the trees are freed after the last test of this folder."""
    yield
    nodes_of.cache_clear()
    parsed.cache_clear()

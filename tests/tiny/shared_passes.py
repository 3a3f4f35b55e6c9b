"""How many adapters each forward pass of several together is for."""

from __future__ import annotations

from typing import Any

import pytest

from lorakeet.train.text import multi_adapter


def members_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of members in each forward pass from now on."""
    found: list[int] = []
    usual = multi_adapter.groups_of

    def watched(*given: Any) -> list[Any]:
        groups = usual(*given)
        found.extend(len(one.parts) for group in groups for one in group.batches)
        return groups

    monkeypatch.setattr(multi_adapter, "groups_of", watched)
    return found

"""Fixtures of the tests of training."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def second_generator(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """A generator on the CPU that torch takes for that of a CUDA device."""
    make, found = torch.Generator, torch.Generator()
    monkeypatch.setattr(torch, "Generator", lambda _="cpu": make())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: found.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: found.set_state(state))
    return found

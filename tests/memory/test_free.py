"""What is free on a device, as the bound of a run: torch's counts of a card are made up, the machine's are read."""

from __future__ import annotations

import pytest
import torch

from lorakeet.memory import free as module
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.free import MARGIN, fits_now, free_memory
from tiny.made_up_card import card

CARD = torch.device("cuda", 0)
GIB = 1 << 30


def test_of_a_card_all_counts_that_is_free_or_torchs_own_less_the_margin() -> None:
    with card(8 * GIB, taken=3 * GIB) as patch:
        patch.setattr(torch.cuda, "memory_reserved", lambda _: GIB)
        found = free_memory(CARD)
        assert found.bytes == 6 * GIB + CONTEXT - MARGIN and found.free == "cuda:0" and bool(found)
        assert found.sentence == "6.25 GiB of memory are free on cuda:0"
    with card(GIB, taken=GIB):
        assert free_memory(CARD).bytes == CONTEXT - MARGIN, "the context is there already"


def test_a_second_base_fits_where_that_much_is_free_or_unused() -> None:
    with card(8 * GIB, taken=7 * GIB) as patch:
        patch.setattr(torch.cuda, "memory_reserved", lambda _: 4 * GIB)
        patch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * GIB)
        assert fits_now(2 * GIB - MARGIN, CARD) and not fits_now(2 * GIB - MARGIN + 1, CARD)
    assert fits_now(1 << 60, torch.device("cpu")), "where the plan alone decides"


def test_of_a_machine_what_the_process_has_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: (3 * GIB, "free"))
    monkeypatch.setattr(module, "resident_bytes", lambda: GIB)
    found = free_memory(torch.device("cpu"))
    assert found.bytes == 4 * GIB and str(found) == "4.00 GiB" and found.free == "this machine"

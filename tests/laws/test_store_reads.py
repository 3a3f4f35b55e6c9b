"""Bytes that a step reads from the store of a streamed model, on the simulated card: nothing is read twice for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakeet.memory.store import WeightStore
from tiny.card_steps import BEGINNING, SPEC, rows_behind, stepped, training_on_card
from tiny.models import save_tiny_llama
from tiny.simulated_card import Card, simulated_card

BLOCKS = 4


@pytest.fixture
def card() -> Iterator[Card]:
    with simulated_card() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", num_hidden_layers=BLOCKS)


def read_in_a_step(folder: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch, **model: Any) -> tuple[int, Any]:
    """Bytes read from the store in the second step of a run whose rows are three micro-batches, and the Training."""
    read: list[int] = []
    own = WeightStore.read
    monkeypatch.setattr(WeightStore, "read", lambda store, begin, into: read.append(into.nbytes) or own(store, begin, into))
    spec = replace(SPEC, batch_size=3, micro_tokens=1, head_chunk=4)  # a row each, whose targets are several chunks
    training = training_on_card(folder, rows_behind(BEGINNING, 24), spec=spec, store=tmp_path / "store", **model)
    stepped(training, card, steps=1)
    read.clear()
    stepped(training, card, steps=1)
    return sum(read), training


def test_nothing_is_read_while_all_of_it_is_on_the_card(
    folder: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = read_in_a_step(folder, tmp_path, card, monkeypatch, slots=BLOCKS, ends=True)
    assert found == 0, "before: the head for every chunk of targets, twice, and a row of the embedding for every token"


def test_blocks_that_leave_are_read_once_each_way(
    folder: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many micro-batches a step has: all pass a block while it is there. With s of n blocks there, 2·(n − s) are read."""
    found, training = read_in_a_step(folder, tmp_path, card, monkeypatch, slots=2, ends=True)
    records = training.task.text.streamed.stream.records
    assert 0 < found <= 2 * (BLOCKS - 2) * max(record.end - record.begin for record in records)

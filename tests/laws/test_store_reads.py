"""Bytes that a step reads from the store of a streamed model, on the simulated card: nothing is read twice for nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakeet.memory.store import WeightStore
from lorakeet.models.text import tiled_loss
from tiny.card_steps import BEGINNING, SPEC, rows_behind, stepped, training_on_card
from tiny.models import save_tiny_llama
from tiny.simulated_card import Card

BLOCKS = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", num_hidden_layers=BLOCKS)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where in the store, and how many bytes, each read was."""
    found: list[tuple[int, int]] = []
    own = WeightStore.read
    reader: Any = lambda store, begin, into: found.append((begin, into.nbytes)) or own(store, begin, into)  # noqa: E731
    monkeypatch.setattr(WeightStore, "read", reader)
    return found


def stepping(folder: Path, tmp_path: Path, card: Card, read: list[tuple[int, int]], *, together: int = 0, **model: Any) -> Any:
    """The Training of a run whose rows are three micro-batches, after the second step, whose reads alone are in `read`."""
    spec = replace(SPEC, batch_size=3, micro_tokens=1, head_chunk=4)  # a row each, whose targets are several chunks
    training = training_on_card(folder, rows_behind(BEGINNING, 24), spec=spec, store=tmp_path / "store", **model)
    training.task.together = together
    stepped(training, card, steps=1)
    read.clear()
    stepped(training, card, steps=1)
    return training


def bytes_of(read: list[tuple[int, int]], training: Any, name: str) -> int:
    """Bytes of one tensor of the store among the reads."""
    place = training.task.text.store.tensors[name]
    return sum(size for begin, size in read if place.begin <= begin < place.end)


@pytest.mark.slow
def test_nothing_is_read_while_all_of_it_is_on_the_card(
    folder: Path, tmp_path: Path, card: Card, read: list[tuple[int, int]]
) -> None:
    stepping(folder, tmp_path, card, read, slots=BLOCKS, ends=True)
    assert read == [], "before: the head for every chunk of targets, twice, and a row of the embedding for every token"


@pytest.mark.slow
def test_blocks_that_leave_are_read_once_each_way(folder: Path, tmp_path: Path, card: Card, read: list[tuple[int, int]]) -> None:
    """However many micro-batches a step has: all pass a block while it is there. With s of n blocks there, 2·(n − s) are read."""
    training = stepping(folder, tmp_path, card, read, slots=2, ends=True)
    records = training.task.text.streamed.stream.records
    assert 0 < sum(size for _, size in read) <= 2 * (BLOCKS - 2) * max(record.end - record.begin for record in records)


@pytest.mark.slow
@pytest.mark.parametrize(("together", "times"), [(0, 1), (3, 1), (2, 2), (1, 3)])
def test_a_head_that_comes_from_the_store_is_read_once_for_all_micro_batches_that_go_together(
    together: int, times: int, tmp_path: Path, card: Card, read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever train.head_chunk is. A row of the embedding is read for each token of a micro-batch, once."""
    monkeypatch.setattr(tiled_loss, "TILE", 24)
    folder = save_tiny_llama(tmp_path / "untied", num_hidden_layers=BLOCKS, tie_word_embeddings=False)
    training = stepping(folder, tmp_path, card, read, slots=BLOCKS, together=together)
    store, batches = training.task.text.store, training.task.batches(1)
    head, table = store.tensors["lm_head.weight"], store.tensors["model.embed_tokens.weight"]
    assert len(batches) == 3 and all(batch.targets > 2 * 4 for batch in batches), "several chunks each"
    assert bytes_of(read, training, "lm_head.weight") == times * (head.end - head.begin)
    row = (table.end - table.begin) // table.shape[0]
    different = [len(set(batch.on_host()[0].tolist())) for batch in batches]
    assert bytes_of(read, training, "model.embed_tokens.weight") <= row * sum(count + 1 for count in different)  # + 1: padding


@pytest.mark.slow
def test_what_another_loss_reads_of_the_head_does_not_grow_with_its_targets(
    tmp_path: Path, card: Card, read: list[tuple[int, int]]
) -> None:
    """Held-out rows: once a micro-batch."""
    folder = save_tiny_llama(tmp_path / "untied", num_hidden_layers=BLOCKS, tie_word_embeddings=False)
    training = stepping(folder, tmp_path, card, read, slots=BLOCKS)
    read.clear()
    training.task.losses_of(training.task.train[:3])
    place = training.task.text.store.tensors["lm_head.weight"]
    assert bytes_of(read, training, "lm_head.weight") == 3 * (place.end - place.begin)


@pytest.mark.slow
def test_a_host_that_keeps_what_was_read_reads_no_block_and_no_head_again(
    tmp_path: Path, card: Card, read: list[tuple[int, int]]
) -> None:
    folder = save_tiny_llama(tmp_path / "untied", num_hidden_layers=BLOCKS, tie_word_embeddings=False)
    training = stepping(folder, tmp_path, card, read, slots=2, pinned=True)
    table = training.task.text.store.tensors["model.embed_tokens.weight"]
    assert read and all(table.begin <= begin < table.end for begin, _ in read), "rows of the embedding alone"

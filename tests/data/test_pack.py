"""Packing keeps every token and every target, and nothing predicts a token of another row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches, pack_examples


@st.composite
def examples(draw):
    found = []
    for number, length in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))):
        mask = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)), bool)
        mask[0] = False
        found.append(Example(np.arange(length, dtype=np.int64) + 100 * number, mask, f"key{number}", None, False))
    return found


def targets(batch):
    """(row key, position in the row of the predicting token, target id) of every target, by the batch's own account."""
    keys = [batch.keys[row] for row in batch.target_rows.tolist()]
    positions = np.concatenate([np.arange(length) for length in batch.lengths])
    return list(zip(keys, positions[batch.target_positions.numpy()].tolist(), batch.target_ids.tolist(), strict=True))


def expected(rows):
    return [(row.key, int(t) - 1, int(row.ids[t])) for row in rows for t in np.flatnonzero(row.supervised)]


@settings(max_examples=60, deadline=None)
@given(examples())
def test_pack_keeps_every_token_and_target(rows):
    batch = pack_examples(rows)
    assert batch.ids.tolist() == [token for row in rows for token in row.ids.tolist()]
    assert batch.tokens == sum(batch.lengths) == len(batch.ids) and batch.targets == sum(
        int(row.supervised.sum()) for row in rows
    )
    assert targets(batch) == expected(rows)
    # The predicting token is the one before the target, in the same row.
    assert batch.ids[batch.target_positions + 1].tolist() == batch.target_ids.tolist()
    assert torch.equal(batch.rows_of_tokens[batch.target_positions], batch.rows_of_tokens[batch.target_positions + 1])


@settings(max_examples=60, deadline=None)
@given(examples())
def test_padded_rows_have_every_token_at_its_place(rows):
    batch = pack_examples(rows)
    places, of_targets = batch.padded_places()
    padded = np.full(len(rows) * max(batch.lengths), -1)
    padded[places] = batch.ids
    for row, tokens in zip(rows, padded.reshape(len(rows), -1), strict=True):
        assert tokens.tolist() == [*row.ids.tolist(), *[-1] * (max(batch.lengths) - len(row.ids))]
    assert padded[of_targets].tolist() == batch.ids[batch.target_positions].tolist()


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(1, 30))
def test_micro_batches_lose_nothing_and_keep_to_the_limit(rows, limit):
    batches = micro_batches(rows, limit)
    assert sorted(target for batch in batches for target in targets(batch)) == sorted(expected(rows))
    assert sorted(key for batch in batches for key in batch.keys) == sorted(row.key for row in rows)
    assert all(batch.tokens <= limit or len(batch.lengths) == 1 for batch in batches)
    again = micro_batches(rows, limit)
    assert [batch.keys for batch in again] == [batch.keys for batch in batches]


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(1, 30))
def test_padding_counts_where_rows_are_padded(rows, limit):
    batches = micro_batches(rows, limit, padded=True)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(row.key for row in rows)
    for batch in batches:
        assert len(batch.lengths) * max(batch.lengths) <= limit or len(batch.lengths) == 1


def test_micro_batches_fill_up():
    rows = [Example(np.zeros(n, np.int64), np.zeros(n, bool), str(n), None, False) for n in (6, 5, 4, 3, 2)]
    assert [batch.lengths for batch in micro_batches(rows, 10)] == [(6, 4), (5, 3, 2)]


def test_micro_batches_are_few_and_alike():
    rows = [Example(np.zeros(n, np.int64), np.zeros(n, bool), str(n), None, False) for n in (9, 8, 7, 6, 2, 1)]
    assert [batch.tokens for batch in micro_batches(rows, 20)] == [17, 16]
    assert [batch.tokens for batch in micro_batches(rows, 1000)] == [33]


def test_types_and_device():
    batch = pack_examples([Example(np.arange(4), np.array([False, True, False, True]), "k", 0, False)]).to("cpu")
    assert {batch.ids.dtype, batch.target_ids.dtype, batch.target_positions.dtype} == {torch.int64}
    assert batch.target_positions.tolist() == [0, 2] and batch.target_ids.tolist() == [1, 3]


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="at least one"):
        pack_examples([])
    with pytest.raises(ValueError, match="first token of row k"):
        pack_examples([Example(np.arange(2), np.array([True, False]), "k", None, False)])

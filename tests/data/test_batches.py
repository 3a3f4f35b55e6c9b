"""The order of rows: every epoch has each row once, and any step can be asked for without the ones before it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.batches import StepOrder, distribute_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 32), st.integers(0, 9), st.integers(0, 3), st.booleans())
def test_every_epoch_has_each_row_once(rows, batch_size, seed, epoch, grouped):
    lengths = tuple((np.arange(rows) * 7919 % 101).tolist()) if grouped else None
    order = StepOrder(rows, batch_size, seed, lengths)
    steps = [order.indices(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
    assert sorted(row for step in steps for row in step) == list(range(rows))
    assert all(len(step) == batch_size for step in steps[:-1]) and len(steps[-1]) == (rows - 1) % batch_size + 1


def test_random_access_equals_walking():
    lengths = tuple(range(50))
    for choice in (None, lengths):
        order = StepOrder(50, 8, 3, choice)
        walked = [order.indices(step) for step in range(30)]
        assert [StepOrder(50, 8, 3, choice).indices(step) for step in reversed(range(30))] == walked[::-1]


def test_epochs_and_seeds_differ():
    order = StepOrder(64, 64, 0)
    orders = [order.indices(0), order.indices(1), StepOrder(64, 64, 1).indices(0)]
    assert len({tuple(o) for o in orders}) == 3 and sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_order_is_pinned_so_that_later_versions_can_resume():
    assert StepOrder(10, 5, 0).indices(0) == [2, 8, 5, 3, 0]


def test_every_place_is_as_likely_for_a_row():
    firsts = [StepOrder(5, 1, seed).indices(0)[0] for seed in range(1000)]
    counts = np.bincount(firsts, minlength=5)
    assert counts.min() > 150 and counts.max() < 250  # expected 200, standard deviation 13


def test_grouping_puts_alike_lengths_together():
    rng = np.random.default_rng(0)
    lengths = tuple(int(n) for n in rng.integers(10, 500, size=640))
    spread = {
        grouped: np.mean([np.ptp(np.array(lengths)[order.indices(step)]) for step in range(order.steps_per_epoch)])
        for grouped, order in ((False, StepOrder(640, 16, 0)), (True, StepOrder(640, 16, 0, lengths)))
    }
    assert spread[True] < spread[False] / 5
    first_lengths = [lengths[StepOrder(640, 16, seed, lengths).indices(0)[0]] for seed in range(20)]
    assert np.ptp(first_lengths) > 200  # steps do not come sorted


def test_counts():
    order = StepOrder(539, 16, 0)
    assert order.steps_per_epoch == 34
    assert len(order.indices(33)) == 539 - 33 * 16 and len(order.indices(34)) == 16


def test_what_makes_no_order():
    with pytest.raises(ValueError, match=r"rows \(0\)"):
        StepOrder(0, 4, 0)
    with pytest.raises(ValueError, match="3 lengths were given for 4 rows"):
        StepOrder(4, 2, 0, (1, 2, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 6))
def test_dealt_rows_go_to_one_part_each_and_the_parts_are_even(lengths, parts):
    found = distribute_rows(lengths, parts)
    assert len(found) == parts and sorted(row for part in found for row in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in found) and found == distribute_rows(tuple(lengths), parts)
    sums = [sum(lengths[row] for row in part) for part in found]
    assert max(sums) - min(sums) <= max(lengths, default=0)  # the last row dealt went to the emptiest part


def test_deals_are_pinned():
    assert distribute_rows([5, 9, 1, 7], 2) == [[1, 2], [0, 3]]
    assert distribute_rows([3], 2) == [[0], []]

"""Tokens that all rows begin with are laid out once, and every token keeps its place and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches
from lorakeet.data.prefix import PASS, BatchLimits, prefix_batches, shared_layout, unshared_layout


def batch(*rows: list[int]) -> Batch:
    """Rows of ids, the last token but one of each predicting the last."""
    lengths = [len(row) for row in rows]
    ends = torch.tensor(lengths).cumsum(0)
    ids = torch.tensor([token for row in rows for token in row])
    return Batch(ids, tuple(lengths), ends - 2, ids[ends - 1], tuple(map(str, range(len(rows)))))


def test_a_shared_beginning_stands_once() -> None:
    laid = shared_layout(batch([7, 8, 1, 2, 3], [7, 8, 4], [7, 8, 5, 6]))
    assert laid.ids.tolist() == [7, 8, 1, 2, 3, 4, 5, 6]
    assert laid.positions.tolist() == [0, 1, 2, 3, 4, 2, 2, 3]
    assert (laid.prefix, laid.lengths) == (2, (3, 1, 2))
    assert laid.ids[laid.target_positions].tolist() == [2, 8, 5]  # the second row's target is predicted at the prefix's end


@pytest.mark.parametrize("rows", [([1, 2, 3],), ([1, 2], [3, 2]), ([5], [5, 6])])
def test_nothing_is_shared_by_one_row_by_different_ones_or_by_a_row_that_would_keep_nothing(rows: tuple[list[int], ...]) -> None:
    whole = (
        batch(*rows)
        if all(len(row) > 1 for row in rows)
        else Batch(torch.tensor([5, 5, 6]), (1, 2), torch.tensor([1]), torch.tensor([6]), ("0", "1"))
    )
    laid, plain = shared_layout(whole), unshared_layout(whole)
    assert laid.prefix == 0
    assert laid.lengths == plain.lengths == whole.lengths
    assert torch.equal(laid.ids, whole.ids)


def test_every_row_keeps_its_last_token() -> None:
    laid = shared_layout(batch([1, 2, 3], [1, 2, 3], [1, 2, 3]))
    assert (laid.prefix, laid.lengths) == (2, (1, 1, 1))
    assert laid.ids.tolist() == [1, 2, 3, 3, 3]
    assert laid.target_positions.tolist() == [1, 1, 1]


def row(name: str, ids: list[int], targets: int = 1) -> Example:
    supervised = np.zeros(len(ids), bool)
    supervised[max(1, len(ids) - targets) :] = True
    return Example(np.array(ids, np.int64), supervised, name, None, False)


def rows_after(prompt: list[int], count: int, own: int, *, name: str = "") -> list[Example]:
    """Rows of `own` tokens of their own behind the prompt, the first of which is another one in each."""
    return [row(f"{name}{number}", [*prompt, 1000 + number, *range(own - 1)]) for number in range(count)]


def prompt(tokens: int, which: int = 0) -> list[int]:
    return [5, *(100 * (which + 1) + number % 50 for number in range(tokens - 1))]


def laid(batches: list[Batch]) -> list[int]:
    return [len(shared_layout(batch).ids) for batch in batches]


@st.composite
def steps(draw: st.DrawFn) -> list[Example]:
    """Rows of few different tokens, many of which begin alike."""
    begin = draw(st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=3))
    found = []
    for number in range(draw(st.integers(1, 12))):
        ids = [*draw(st.sampled_from(begin)), *draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))]
        found.append(row(str(number), ids, draw(st.integers(0, 6))))
    return found


def shared_alike(examples: list[Example], tokens: int, *, times: int = 8, a_pass: int = PASS) -> list[Batch]:
    return prefix_batches(examples, BatchLimits(tokens, times, a_pass))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(steps(), st.integers(1, 40), st.sampled_from([1, 2, 8]), st.sampled_from([0, 3, PASS, 1 << 30]))
def test_nothing_is_lost_no_batch_is_larger_than_said_and_never_is_more_computed(
    examples: list[Example], limit: int, times: int, a_pass: int
) -> None:
    batches = shared_alike(examples, limit, times=times, a_pass=a_pass)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(each.key for each in examples)
    assert sum(batch.targets for batch in batches) == sum(int(each.supervised.sum()) for each in examples)
    of = {each.key: each.ids.tolist() for each in examples}
    for batch, tokens in zip(batches, laid(batches), strict=True):
        assert batch.ids.tolist() == [token for key in batch.keys for token in of[key]]
        if len(batch.lengths) > 1:
            assert max(tokens, batch.targets) <= limit and batch.tokens <= times * limit
    again = shared_alike(examples, limit, times=times, a_pass=a_pass)
    assert [batch.keys for batch in again] == [batch.keys for batch in batches]
    plain = micro_batches(examples, limit)
    assert sum(laid(batches)) + a_pass * len(batches) <= sum(laid(plain)) + a_pass * len(plain)


def test_a_long_prompt_passes_once_for_as_many_rows_as_fit_behind_it() -> None:
    examples = rows_after(prompt(1500), 10, 100)
    assert laid(micro_batches(examples, 2048)) == [1600] * 10
    assert laid(shared_alike(examples, 2048)) == [2000, 2000]
    assert laid(shared_alike(examples, 1600)) == [1600] * 10
    assert laid(shared_alike(examples, 2048, times=1)) == [1600] * 10, "where every row has a copy of the prompt"


def test_rows_of_several_prompts_pass_apart_where_that_saves_more_than_a_pass_costs() -> None:
    """Short ones stay with the others: a pass costs as much as PASS tokens, or more than anything where it reads all weights."""
    of_each = [rows_after(prompt(400, n), 6, 30, name=f"{n}/") for n in (0, 1)]
    both = [each for pair in zip(*of_each, strict=True) for each in pair]
    batches = shared_alike(both, 2048)
    assert sorted(laid(batches)) == [580, 580]
    assert [{key[0] for key in batch.keys} for batch in batches] in ([{"0"}, {"1"}], [{"1"}, {"0"}])
    assert len(shared_alike(both, 8192, a_pass=1 << 30)) == 1
    few = [each for n in (0, 1) for each in rows_after(prompt(PASS // 6, n), 6, 30)]
    assert len(shared_alike(few, 2048)) == 1


def test_rows_without_a_prompt_stay_together_when_those_with_one_leave() -> None:
    alone = [row(f"alone {number}", [number + 7, *range(40)]) for number in range(0, 900, 300)]  # on both sides in the order
    batches = shared_alike([*alone, *rows_after(prompt(600), 5, 20, name="prompt ")], 2048)
    assert sorted(laid(batches)) == [123, 700]
    assert {len({key.split()[0] for key in batch.keys}) for batch in batches} == {1}


def test_target_tokens_count_each_although_they_are_computed_once() -> None:
    """Every target asks for logits of its own, also within what all rows begin with."""
    examples = [row(str(number), [*prompt(200), number], targets=200) for number in range(6)]
    assert [batch.targets for batch in shared_alike(examples, 512)] == [400] * 3
    assert laid(shared_alike([row(each.key, each.ids.tolist()) for each in examples], 512)) == [206]


@pytest.mark.parametrize("lengths", [(90, 80, 70, 60, 20, 10), (500, 30), (12,), (40,) * 9])
def test_rows_that_begin_otherwise_are_cut_as_ever(lengths: tuple[int, ...]) -> None:
    examples = [row(str(number), [50 - number, *range(length - 1)]) for number, length in enumerate(lengths)]
    assert [batch.keys for batch in shared_alike(examples, 200)] == [batch.keys for batch in micro_batches(examples, 200)]

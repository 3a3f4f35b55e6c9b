"""Tests of lorakeet.train.text.joint_batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack_examples
from lorakeet.train.text.joint_batches import SMALL, Group, groups_of, join_batches, merge_groups


def rows(*lengths: int, supervised: bool = True) -> list[Example]:
    return [
        Example(np.arange(n, dtype=np.int64), (np.arange(n) >= n // 2) & supervised, f"{number}", None, False)
        for number, n in enumerate(lengths)
    ]


def step(*lengths: int) -> list[Batch]:
    """A step of one micro-batch."""
    return [pack_examples(rows(*lengths))]


def test_joined_batches_keep_their_rows_and_targets() -> None:
    examples = rows(8, 19, 12, 9, 11)
    joined, whole = join_batches([pack_examples(examples[:2]), pack_examples(examples[2:])]), pack_examples(examples)
    assert (joined.lengths, joined.keys) == (whole.lengths, whole.keys)
    for part in ("ids", "target_positions", "target_ids"):
        assert torch.equal(getattr(joined, part), getattr(whole, part))


def test_small_steps_share_passes_of_about_equal_size() -> None:
    steps = [step(20, 20) for _ in range(8)]
    groups = groups_of(steps, 100)
    assert [group.members for group in groups] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    groups = groups_of(steps, 200)
    assert [group.members for group in groups] == [(0, 1, 2, 3), (4, 5, 6, 7)], "not five and three"
    assert all(len(group.batches) == 1 and group.batches[0].alone is None for group in groups)
    assert torch.equal(groups[0].batches[0].batch.ids, join_batches([one for own in steps[:4] for one in own]).ids)


@pytest.mark.parametrize("tokens", [1, 50, 170])
def test_no_pass_holds_more_tokens_than_that_of_a_single_run(tokens: int) -> None:
    steps = [step(length) for length in (50, 9, 40, 30, 30, 41)]
    groups = groups_of(steps, tokens)
    assert all(one.batch.tokens <= tokens or one.alone is not None for group in groups for one in group.batches)
    assert [index for group in groups for index in group.members] == list(range(6))


def test_larger_steps_are_by_themselves_and_do_not_part_the_small_ones() -> None:
    large = [pack_examples(rows(SMALL - 1)), pack_examples(rows(2))]
    steps = [step(10), large, step(12), step(SMALL + 1), step(SMALL)]
    groups = groups_of(steps, 1024)
    assert [group.members for group in groups] == [(0, 2, 4), (1,), (3,)]
    assert [one.alone for one in groups[1].batches] == [1, 1] and [one.batch for one in groups[1].batches] == large
    whole = merge_groups(groups)
    assert whole == Group((0, 2, 4, 1, 3), tuple(one for group in groups for one in group.batches))


def test_what_has_no_target_does_not_pass_and_its_member_still_has_a_group() -> None:
    silent = [pack_examples(rows(10, supervised=False))]
    groups = groups_of([silent, [*silent, *step(10)], step(10)], 1024)
    assert {group.members: len(group.batches) for group in groups} == {(1, 2): 1, (0,): 0}

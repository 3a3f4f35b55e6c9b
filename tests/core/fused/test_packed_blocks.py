"""Which tokens stand in which block, and that reading, writing and adding reach each token once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorakeet.core.fused.packed_blocks import Indexed, QueryBlocks, blocks_of_queries, token_indices, whole_row_blocks

ROWS, PREFIX = (5, 1, 40, 3, 70), 4
TOKENS = PREFIX + sum(ROWS)


def laid(blocks: tuple[QueryBlocks, ...]) -> list[Indexed]:
    return [token_indices(each, torch.device("cpu"))[0] for each in blocks]


@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_every_query_belongs_to_one_block_alone(prefix: int) -> None:
    for found in (whole_row_blocks(ROWS, prefix, 64), blocks_of_queries(ROWS, prefix, 2, 16, 4096)):
        own = np.concatenate([blocks.queries.tokens[blocks.queries.own] for blocks in found])
        assert sorted(own) == list(range(prefix + sum(ROWS)))


def test_queries_meet_the_keys_up_to_their_last_one() -> None:
    found = blocks_of_queries((70,), 0, 2, 32, 1 << 20)
    assert [(blocks.offset, blocks.queries.tokens.shape, blocks.keys.tokens.shape) for blocks in found] == [
        (0, (1, 32), (1, 32)), (32, (1, 32), (1, 64)), (64, (1, 32), (1, 96))
    ]  # fmt: skip


def test_what_is_read_and_put_back_is_what_was_there() -> None:
    states = torch.randn(1, 3, TOKENS, 2)
    target = torch.zeros(TOKENS, 3, 2)
    for places in laid(whole_row_blocks(ROWS, PREFIX, 64)):
        places.put(target, places.of(states, torch.float32))
    assert torch.equal(target, states[0].transpose(0, 1))


def test_a_shared_prefix_gets_the_sum_over_the_rows_and_a_rows_own_tokens_what_is_theirs() -> None:
    target = torch.zeros(TOKENS, 1, 1)
    for places in laid(whole_row_blocks(ROWS, PREFIX, 64)):
        places.add(target, torch.ones(*places.shape, 1, 1))
    assert target[:PREFIX].flatten().tolist() == [len(ROWS)] * PREFIX
    assert target[PREFIX:].flatten().tolist() == [1] * sum(ROWS)

"""The order in which numbers of fused and grouped tensors come out. That llama.cpp reads them so: test_gguf_families."""

from __future__ import annotations

import torch

from lorakeet.exporting import gguf_conversions as conversions

HEADS = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 1, "linear_value_head_dim": 2,
    "mamba_n_groups": 2,
}  # fmt: skip


def column(count: int) -> torch.Tensor:
    return torch.arange(count).float()[:, None]


def test_heads_of_v_come_one_of_each_group_after_the_other() -> None:
    # Heads 0 and 1 share the first head of k, 2 and 3 the second; each has two rows.
    assert conversions.v_rows(column(8), HEADS).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert conversions.one_v_row(column(4), HEADS).flatten().tolist() == [0, 2, 1, 3]
    assert conversions.v_columns(column(8).T, HEADS).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert conversions.last_rows(column(12), HEADS).flatten().tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]


def test_q_k_v_and_z_of_each_head_are_gathered() -> None:
    # For each head of k: q, k, four rows of v, four of z.
    qkv = conversions.qkv_of_qkvz(column(20), HEADS).flatten().tolist()
    assert qkv == [0, 10, 1, 11, 2, 3, 4, 5, 12, 13, 14, 15]
    assert conversions.z_of_qkvz(column(20), HEADS).flatten().tolist() == [6, 7, 8, 9, 16, 17, 18, 19]


def test_decays_are_no_logarithms_any_more() -> None:
    found = conversions.decay_column(torch.tensor([0.0, 1.0]), {})
    torch.testing.assert_close(found, torch.tensor([[-1.0], [-torch.e]]))
    assert conversions.by_groups(torch.arange(6), HEADS).shape == (2, 3)

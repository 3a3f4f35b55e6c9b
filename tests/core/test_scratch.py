"""The buffer that packed weights share: one matrix at a time, as large as the largest."""

from __future__ import annotations

import torch

from lorakeet.core.scratch import Scratch


def test_one_buffer_grows_with_the_largest_matrix_and_is_lent_again() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    small = scratch.matrix((2, 3), torch.bfloat16, cpu)
    large = scratch.matrix((4, 5), torch.bfloat16, cpu)
    again = scratch.matrix((3, 2), torch.bfloat16, cpu)
    assert small.shape == (2, 3) and again.shape == (3, 2)
    assert again.data_ptr() == large.data_ptr()
    assert scratch.matrix((1, 1), torch.float32, cpu).data_ptr() != large.data_ptr()
    scratch.clear()
    assert not scratch._buffers


def test_a_buffer_made_in_inference_mode_is_written_to_afterwards() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    with torch.inference_mode():
        scratch.matrix((2, 3), torch.float32, cpu).fill_(1)
    assert float(scratch.matrix((2, 3), torch.float32, cpu).fill_(2).sum()) == 12

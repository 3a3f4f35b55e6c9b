"""Rows whose places a tensor tells: what they are by the definition, wherever they lie, also with places that no row takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels import flash_varlen
from lorakeet.kernels.flash_varlen import (
    OFFSET_ROWS,
    OFFSET_ROWS_BACKWARD,
    FlashVarlenAtOffsets,
    RowOffsets,
    offset_rows,
    offset_rows_backward,
)
from lorakeet.models.attention import packed_attention
from tiny.flash import Flash
from tiny.tape import Tape

HEADS, KV, WIDTH, LONGEST = 6, 2, 8, 12


def states(tokens: int) -> tuple[Tensor, ...]:
    """Q, K, V and a gradient, laid token by token as a model has them."""
    draw = torch.Generator().manual_seed(tokens)
    made = (torch.randn(1, tokens, heads, WIDTH, generator=draw) for heads in (HEADS, KV, KV, HEADS))
    return tuple(each.bfloat16().transpose(1, 2) for each in made)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("rows", "empty"), [((5, 1, 9, 3), 0), ((5, 1, 9, 3), 4), ((12,), 1)])
def test_rows_at_places_are_what_attention_is_defined_to_be(
    flash: Flash, rows: tuple[int, ...], empty: int, window: int | None
) -> None:
    flash.exact = False
    tokens = sum(rows)
    *qkv, grad = states(tokens)
    starts = torch.tensor([0, *rows, *[0] * empty]).cumsum(0).int()
    leaves = [each.detach().requires_grad_() for each in qkv]
    settings = {"sliding_window": window, "scaling": WIDTH**-0.5}
    out, _ = packed_attention(nn.Module(), *leaves, row_lengths=(LONGEST,), row_offsets=RowOffsets(starts, LONGEST), **settings)
    found = out.detach(), *torch.autograd.grad(out, leaves, grad.transpose(1, 2))
    assert flash.calls == 1
    laid = list(rows), 0, WIDTH**-0.5, -1 if window is None else window
    for mine, theirs in zip(found, flash_varlen.by_definition(tuple(qkv), grad, laid), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=2e-2)


def test_they_move_with_the_numbers_in_the_tensor(flash: Flash) -> None:
    flash.exact = False
    q, k, v, _ = states(10)
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    kernel = FlashVarlenAtOffsets(RowOffsets(starts, LONGEST), WIDTH**-0.5)
    before, _ = kernel.forward(q, k, v)
    starts[1] = 6
    after, _ = kernel.forward(q, k, v)
    offsets = RowOffsets(torch.tensor([0, 6, 10], dtype=torch.int32), LONGEST)
    expected, _ = FlashVarlenAtOffsets(offsets, WIDTH**-0.5).forward(q, k, v)
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_shapes_alone_have_results_in_their_shapes() -> None:
    q, k = (torch.empty(10, heads, WIDTH, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KV))
    laid = torch.empty(3, dtype=torch.int32, device="meta"), 8, 1.0, -1
    out, logs = OFFSET_ROWS(q, k, k, *laid)
    assert out.shape == q.shape and logs.shape == (HEADS, 10) and logs.dtype == torch.float32
    of_q, of_k, of_v = OFFSET_ROWS_BACKWARD(q, q, k, k, out, logs, *laid)
    assert of_q.shape == q.shape and of_k.shape == of_v.shape == k.shape


def test_nothing_within_the_operators_is_read_by_the_host(flash: Flash) -> None:
    """A recording on a card looks into them."""
    flash.exact = False
    q, k, v, grad = (each[0].transpose(0, 1).contiguous() for each in states(10))
    laid = torch.tensor([0, 4, 10], dtype=torch.int32), LONGEST, WIDTH**-0.5, -1
    tape = Tape()
    with tape:
        out, logs = offset_rows(q, k, v, *laid)
        offset_rows_backward(grad, q, k, v, out, logs, *laid)
    names = {func._schema.name.rpartition("::")[2] for func, *_ in tape.operations}
    assert names == {"_flash_attention_forward", "_flash_attention_backward", "zeros", "empty"}


def test_attention_that_the_kernel_does_not_have_is_refused_where_a_tensor_tells_of_rows(flash: Flash) -> None:
    q, k, v, _ = states(10)
    places = RowOffsets(torch.tensor([0, 4, 10], dtype=torch.int32), LONGEST)
    for settings in ({"softcap": 2.0}, {"dropout": 0.5}):
        with pytest.raises(EnvironmentProblem, match="attends in a way that torch's flash kernel does not have"):
            packed_attention(nn.Module(), q, k, v, row_lengths=(10,), row_offsets=places, **settings)
    with pytest.raises(EnvironmentProblem, match="flash kernel does not have"):
        packed_attention(nn.Module(), *(each.float() for each in (q, k, v)), row_lengths=(10,), row_offsets=places)

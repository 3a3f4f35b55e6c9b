"""Whole modules and token rows by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakeet.core.layers.extras import TokenRowsEmbedding, TokenRowsHead, TrainedModule, TrainedRows
from lorakeet.core.selection import Share


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_copy_is_trained_in_fp32_beside_the_original(dtype: torch.dtype) -> None:
    linear = nn.Linear(4, 3).to(dtype).requires_grad_(False)
    layer, x = TrainedModule(linear), torch.randn(2, 4).to(dtype)
    layer.attach("a", layer.new_copy())
    layer.active = "a"
    assert layer(x).dtype == dtype
    assert torch.allclose(layer(x), linear(x), atol=1e-2)
    assert {p.dtype for p in layer.adapters["a"].parameters()} == {torch.float32}
    assert all(p.requires_grad for p in layer.adapters["a"].parameters())
    with torch.no_grad():
        layer.adapters["a"].weight.add_(1)
    assert not torch.allclose(layer(x), linear(x), atol=1e-1)
    assert layer.weight is layer.adapters["a"].weight
    layer.active = None
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight


def test_a_whole_embedding_answers_in_the_dtype_of_the_original() -> None:
    layer = TrainedModule(nn.Embedding(6, 4).bfloat16())
    layer.attach("a", layer.new_copy())
    layer.active = "a"
    assert layer(torch.tensor([1, 5])).dtype == torch.bfloat16


def test_slots() -> None:
    rows = TrainedRows((7, 3), torch.zeros(2, 4), tokens=("<a>", "<b>"), tied="head")
    assert rows.slots(torch.tensor([[3, 0], [7, 3]])).tolist() == [[1, -1], [0, 1]]
    assert (rows.tokens, rows.tied) == (("<a>", "<b>"), "head")


def test_rows_replace_lookups_and_logits_of_their_ids_alone() -> None:
    embedding, head = nn.Embedding(10, 4).requires_grad_(False), nn.Linear(4, 10, bias=False).requires_grad_(False)
    rows = TrainedRows((7, 3), torch.randn(2, 4))
    lookup, logits = TokenRowsEmbedding(embedding), TokenRowsHead(head)
    for layer in (lookup, logits):
        assert layer.rows_before == 10
        layer.attach("a", rows)
        layer.active = "a"
    ids, hidden = torch.tensor([[3, 0], [7, 3]]), torch.randn(2, 5, 4)
    expected = embedding(ids).clone()
    expected[0, 0] = expected[1, 1] = rows.values[1].detach()
    expected[1, 0] = rows.values[0].detach()
    assert torch.equal(lookup(ids), expected)
    answer = logits(hidden)
    assert torch.allclose(answer[..., [7, 3]], hidden @ rows.values.t(), atol=1e-6)
    others = [0, 1, 2, 4, 5, 6, 8, 9]
    assert torch.equal(answer[..., others], head(hidden)[..., others])
    (lookup(torch.tensor([7])).sum() + answer[..., 3].sum()).backward()
    assert torch.allclose(rows.values.grad, torch.stack([torch.ones(4), hidden.sum((0, 1))]), atol=1e-5)
    for layer, value in ((lookup, ids), (logits, hidden)):
        layer.active = None
        assert torch.equal(layer(value), layer.original(value))


def test_a_divided_batch_is_refused_and_not_answered_by_the_base() -> None:
    whole, lookup = TrainedModule(nn.Linear(4, 3)), TokenRowsEmbedding(nn.Embedding(10, 4))
    logits = TokenRowsHead(nn.Linear(4, 10))
    whole.attach("a", whole.new_copy())
    for layer in (lookup, logits):
        layer.attach("a", TrainedRows((7,), torch.zeros(1, 4)))
    for layer, x in ((whole, torch.randn(2, 4)), (lookup, torch.tensor([7, 1])), (logits, torch.randn(2, 4))):
        layer.selection.divide([Share(0, 1, "a")], units=2)
        with pytest.raises(ValueError, match="cannot differ within a batch"):
            layer(x)
        layer.selection.divide([Share(0, 1, "b")], units=2)  # no adapter of this layer
        assert torch.equal(layer(x), layer.original(x))

"""New tokens: rows that grow, train, travel and go again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakeet.core.plan import Plan
from lorakeet.models.inject import activate, adapter_of, attach, eject, inject, trained_parameters
from tiny.models import FAMILIES, tiny_model

IDS = torch.tensor([[5, 9, 11, 4, 30, 31]])
WITH_NEW = torch.tensor([[5, 96, 11, 97, 30, 96]])


@pytest.mark.parametrize("family", FAMILIES)
def test_old_rows_keep_their_bits_and_new_ones_begin_at_the_mean(planned: Callable[..., Plan], family: str) -> None:
    model = tiny_model(family)
    old, answer = model.get_input_embeddings().weight.clone(), model(IDS).logits
    inject(model, planned(model, target_modules=(), new_tokens=("<a>", "<b>")))
    assert model.config.vocab_size == 98
    assert torch.equal(model.get_input_embeddings().weight[:96], old)
    logits = model(IDS).logits
    assert logits.shape[-1] == 98
    assert torch.allclose(logits[..., :96], answer, atol=1e-6)
    for parameter in trained_parameters(model).values():
        assert torch.allclose(parameter[0], parameter[1])
    (first, *_) = trained_parameters(model).values()
    assert torch.allclose(first[0], old.mean(0), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_rows_are_rows_of_the_weights(adapted: Callable[..., Any], family: str) -> None:
    """The model with trained rows against one whose embedding and head hold them as plain weights."""
    model = adapted(tiny_model(family), target_modules=(), new_tokens=("<a>", "<b>"))
    value = adapter_of(model)
    plain = tiny_model(family)
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    tied = head.weight is embedding.weight
    for path, rows in value.token_rows.items():
        assert rows.ids == (96, 97)
        assert rows.tokens == ("<a>", "<b>")
        assert bool(rows.tied) == tied
        module = plain.get_submodule(path)
        grown = torch.nn.Parameter(torch.cat([module.weight, rows.rows]), requires_grad=False)
        for each in (embedding, head) if tied else (module,):
            each.weight = grown
    assert torch.allclose(model(WITH_NEW).logits, plain(WITH_NEW).logits, atol=2e-5)
    assert len(trained_parameters(model)) == len(value.token_rows) == (1 if tied else 2)


def test_gradients_reach_the_rows_from_both_ends(adapted: Callable[..., Any]) -> None:
    model = adapted(tiny_model("qwen2"), target_modules=(), new_tokens=("<a>", "<b>"))
    model(torch.tensor([[5, 96, 11]])).logits[..., 97].sum().backward()
    (rows,) = trained_parameters(model).values()
    assert rows.grad[0].abs().max() > 0  # looked up
    assert rows.grad[1].abs().max() > 0  # predicted


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_eject_shrinks_again(adapted: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    before, answer = {k: v.clone() for k, v in model.state_dict().items()}, model(IDS).logits
    adapted(model, new_tokens=("<a>",))
    eject(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(IDS).logits, answer)
    assert model.config.vocab_size == 96
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (family != "llama")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_travel_with_the_adapter(adapted: Callable[..., Any], family: str) -> None:
    model = adapted(tiny_model(family), new_tokens=("<a>", "<b>"))
    other = tiny_model(family)
    attach(other, adapter_of(model))
    assert torch.equal(other(WITH_NEW).logits, model(WITH_NEW).logits)


def test_ids_within_the_vocabulary_need_no_new_rows(planned: Callable[..., Plan]) -> None:
    model = tiny_model("qwen2")
    inject(model, planned(model, target_modules=(), new_tokens=("<a>",)), token_ids=(90,))
    assert model.config.vocab_size == 96
    (rows,) = trained_parameters(model).values()
    with torch.no_grad():
        rows.mul_(5)
    changed = model(torch.tensor([[90, 5]])).logits
    activate(model, None)
    assert not torch.allclose(changed, model(torch.tensor([[90, 5]])).logits, atol=1e-2)

"""`models.frozen`: a digest of each frozen number, whatever adapters stand around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakeet.models.text.digests import changed_tensors, frozen_digests


def test_adapters_are_no_part_of_it(tiny_model: Callable[..., Any], adapted: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    before = frozen_digests(model)
    assert set(before) >= {name for name, _ in model.named_parameters()}
    assert frozen_digests(adapted(model)) == before


def test_a_changed_or_missing_tensor_is_named(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen2")
    before = frozen_digests(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias[0] += 1
    after = frozen_digests(model)
    assert changed_tensors(before, after) == ["model.layers.0.self_attn.q_proj.bias"]
    del after["model.norm.weight"]
    assert "model.norm.weight" in changed_tensors(before, after)


def test_dtype_counts_and_meta_tensors_are_left_out() -> None:
    half = torch.nn.Linear(2, 2, bias=False).half()
    full = torch.nn.Linear(2, 2, bias=False)
    full.weight.data = half.weight.float()
    assert changed_tensors(frozen_digests(half), frozen_digests(full)) == ["weight"]
    assert frozen_digests(torch.nn.Linear(2, 2, device="meta")) == {}

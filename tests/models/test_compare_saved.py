"""What was trained, saved and loaded is compared by name and to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.formats.peft import peft
from lorakeet.models.compare_saved import SavedDifference, compare_saved
from lorakeet.models.inject import adapter_of, attach
from tiny.models import tiny_model

Adapted = Callable[..., Any]


def found(live: Any, saved: Adapter, loaded: Adapter | None = None) -> SavedDifference:
    """`loaded` is what the other model has; by default what was saved."""
    other = tiny_model(live.config.model_type)
    attach(other, saved if loaded is None else loaded, "read")
    return compare_saved((live, "default"), saved, (other, "read"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"variant": "dora"}),
        ("llama", {"start": "pissa"}),
        ("qwen2_moe", {}),
        ("gpt2", {"target_modules": ("c_attn", "wpe")}),
        ("llama", {"extra_modules": ("lm_head",)}),
        ("llama", {"new_tokens": ("<a>", "<b>")}),
    ],
)
def test_what_was_written_is_what_was_trained(adapted: Adapted, family: str, settings: Any, tmp_path: Path) -> None:
    live = adapted(tiny_model(family), **settings)
    peft.write(adapter_of(live), tmp_path)
    same = found(live, peft.read(tmp_path))
    assert same == SavedDifference(same.count, (), (), (), (), ()) and same.count >= 4


def test_a_pair_that_the_file_lacks_is_named(adapted: Adapted, tmp_path: Path) -> None:
    live = adapted(tiny_model("llama"))
    whole = adapter_of(live)
    path = "model.layers.1.mlp.up_proj"
    peft.write(replace(whole, pairs={name: pair for name, pair in whole.pairs.items() if name != path}), tmp_path)
    lacking = found(live, peft.read(tmp_path))
    assert lacking.not_saved == lacking.not_loaded == (f"{path}.A", f"{path}.B")
    assert not lacking.only_saved and not lacking.only_loaded and not lacking.changed
    narrow = adapted(tiny_model("llama"), target_modules=("q_proj",))
    more = found(narrow, whole)
    assert f"{path}.A" in more.only_saved and f"{path}.A" in more.only_loaded and len(more.only_saved) == 24


def test_one_bit_in_the_file_or_in_the_model_is_found(adapted: Adapted) -> None:
    live = adapted(tiny_model("llama"))
    whole = adapter_of(live)
    path = next(iter(whole.pairs))
    B = whole.pairs[path].B.clone()
    B[0, 0] = torch.nextafter(B[0, 0], torch.tensor(9.0))
    other = replace(whole, pairs={**whole.pairs, path: replace(whole.pairs[path], B=B)})
    assert found(live, other).changed == found(live, whole, other).changed == found(live, other, whole).changed == (f"{path}.B",)

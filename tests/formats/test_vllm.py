"""For vLLM: what it would misread is rewritten exactly, what it cannot hold is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError
from lorakeet.formats.vllm import check_vllm, max_rank, misread, uniform
from tiny.adapters import random_adapter
from tiny.models import tiny_model


def test_mixed_ranks_and_scales_are_rewritten_exactly() -> None:
    model = tiny_model("llama")
    one, two = random_adapter(model, "q_proj"), random_adapter(model, "v_proj", rank=9, alpha=5.0)
    mixed = Adapter({**one.pairs, **{path: replace(p, scale_rule="alpha/sqrt(rank)") for path, p in two.pairs.items()}})
    check_vllm(mixed)
    assert misread(mixed) and not misread(one) and (max_rank(one), max_rank(mixed)) == (8, 16)
    flat = uniform(mixed)
    assert not misread(flat) and {(pair.rank, pair.scale) for pair in flat.pairs.values()} == {(9, 1.0)}
    for path, pair in mixed.pairs.items():
        torch.testing.assert_close(flat.pairs[path].delta(), pair.delta())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dora": True}, "DoRA's magnitudes"), ({"rank": 600}, "largest rank is 600"), ({"bias": torch.ones(32)}, "lora_bias")],
)
def test_what_vllm_cannot_hold(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_vllm(random_adapter(tiny_model("llama"), "q_proj", **options))

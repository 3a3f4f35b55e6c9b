"""What a format cannot hold is named, all at once, with the way that works."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from lorakeet.core.adapter import Adapter, TokenRows
from lorakeet.errors import ConfigError
from lorakeet.formats.limits import check_supported, check_uniform_dora, check_vllm, misread_by_vllm, uniform, vllm_max_rank
from tiny.adapters import random_adapter
from tiny.models import tiny_model


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    adapter = random_adapter(tiny_model("llama"), "q_proj", "k_proj", "embed_tokens", dora=True)
    first = next(iter(adapter.pairs))
    pairs = {**adapter.pairs, first: dataclasses.replace(adapter.pairs[first], bias=torch.ones(3))}
    full = Adapter(pairs, {"lm_head.weight": torch.ones(2)}, {"embed": TokenRows((1,), torch.ones(1, 2))})
    with pytest.raises(ConfigError) as caught:
        check_supported(full, "plain", kinds=("linear",), dora=False, folds=True)
    for words in (
        "5 problems", "pairs of kind embedding: model.embed_tokens", "DoRA's magnitudes", "(5 in all)", "--base FOLDER --rank N",
        f"lora_bias): {first}", "modules_to_save): lm_head.weight", "token rows: embed", "lorakeet merge", "--to peft",
    ):  # fmt: skip
        assert words in str(caught.value)


def test_what_fits_passes_and_nothing_does_not() -> None:
    check_supported(random_adapter(tiny_model("llama"), "q_proj", dora=True), "plain", kinds=("linear",), dora=True)
    with pytest.raises(ConfigError, match="no pair that plain could hold"):
        check_supported(Adapter({}), "plain", kinds=("linear",), dora=True)


def test_half_dora_is_refused() -> None:
    dora, plain = (random_adapter(tiny_model("llama"), leaf, dora=leaf == "q_proj") for leaf in ("q_proj", "k_proj"))
    check_uniform_dora(dora, "mlx")
    with pytest.raises(ConfigError, match=r"q_proj are DoRA and .*k_proj are not"):
        check_uniform_dora(Adapter({**dora.pairs, **plain.pairs}), "mlx")


def test_mixed_ranks_and_scales_are_rewritten_exactly() -> None:
    model = tiny_model("llama")
    one, two = random_adapter(model, "q_proj"), random_adapter(model, "v_proj", rank=9, alpha=5.0)
    mixed = Adapter({**one.pairs, **{path: replace(p, scale_rule="alpha/sqrt(rank)") for path, p in two.pairs.items()}})
    check_vllm(mixed)
    assert misread_by_vllm(mixed) and not misread_by_vllm(one) and (vllm_max_rank(one), vllm_max_rank(mixed)) == (8, 16)
    flat = uniform(mixed)
    assert not misread_by_vllm(flat) and {(pair.rank, pair.scale) for pair in flat.pairs.values()} == {(9, 1.0)}
    for path, pair in mixed.pairs.items():
        torch.testing.assert_close(flat.pairs[path].delta(), pair.delta())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dora": True}, "DoRA's magnitudes"), ({"rank": 600}, "largest rank is 600"), ({"bias": torch.ones(32)}, "lora_bias")],
)
def test_what_vllm_cannot_hold(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_vllm(random_adapter(tiny_model("llama"), "q_proj", **options))

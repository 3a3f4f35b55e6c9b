"""What a format cannot hold is named, all at once, with the way that works."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorakeet.core.adapter import Adapter, TokenRows
from lorakeet.errors import ConfigError
from lorakeet.formats.limits import check_supported, check_uniform_dora
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

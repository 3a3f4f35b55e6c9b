"""On a GPU the memory of attention grows with the length of a row, not with its square: also with a cap, sinks or dropout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakeet.data.chat import Example
from lorakeet.kernels import blockwise_rows
from lorakeet.kernels.device import standing_for
from lorakeet.memory.ledger import Ledger
from lorakeet.models.attention import packed_attention
from lorakeet.train.spec import TrainSpec
from tiny.card_steps import stepped, training_on_card
from tiny.flash import CARD
from tiny.models import save_tiny_llama
from tiny.simulated_card import simulated_card

HEADS = 4  # of the tiny models
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "capped": ("bfloat16", {"family": "gemma2"}), "sinks": ("bfloat16", {"family": "gpt_oss"}),
    "sinks in fp32": ("float32", {"family": "gpt_oss"}), "dropout": ("float32", {"attention_dropout": 0.1}),
    "odd heads": ("float32", {"head_dim": 12}), "narrow values": ("bfloat16", {"family": "deepseek_v3", "v_head_dim": 8}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As rows of these lengths are long: a block of a row has few of its scores."""
    monkeypatch.setattr(blockwise_rows, "SCORES", 1 << 16)
    for cached in (blockwise_rows.query_blocks, blockwise_rows.keys_seen):
        cached.cache_clear()
    yield
    for cached in (blockwise_rows.query_blocks, blockwise_rows.keys_seen):
        cached.cache_clear()


def a_row(length: int) -> list[Example]:
    ids = np.random.default_rng(length).integers(4, 60, size=length)
    return [Example(ids, np.arange(length) >= length - 8, "0", None, False)]


def largest_of_a_step(folder: Path, length: int, dtype: str) -> int:
    """Bytes of the largest tensor that a step over one row makes on the card."""
    spec = TrainSpec(steps=2, batch_size=1, micro_tokens=length, learning_rate=1e-3)
    with simulated_card() as card:
        training = training_on_card(folder, a_row(length), dtype=dtype, spec=spec)
        stepped(training, card, steps=2)
        return card.largest


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_makes_no_tensor_that_grows_with_the_square_of_a_row(kind: str, tmp_path: Path) -> None:
    dtype, changes = KINDS[kind]
    folder = save_tiny_llama(tmp_path / "model", max_position_embeddings=1024, **changes)
    one, two = (largest_of_a_step(folder, length, dtype) for length in (256, 512))
    assert two <= 2.2 * one, (one, two)
    assert two < HEADS * 512**2 * torch.float32.itemsize / 3, "probabilities of the whole row"


RULES: dict[str, dict[str, Any]] = {
    "plain": {}, "window": {"sliding_window": 1000}, "capped": {"softcap": 50.0},
    "capped in a window": {"softcap": 50.0, "sliding_window": 1000}, "sinks": {"s_aux": 8}, "dropout": {"dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_plan_knows(rule: str, dtype: torch.dtype) -> None:
    """Twice the row, twice the memory, both ways, in a rehearsal of which plans are made."""

    def peaks(tokens: int) -> tuple[int, int]:
        with Ledger() as ledger, standing_for(CARD):
            q, k, v = (torch.empty(1, tokens, heads, 64, dtype=dtype).transpose(1, 2) for heads in (8, 2, 2))
            settings = {**RULES[rule], **({"s_aux": torch.zeros(8)} if "s_aux" in RULES[rule] else {})}
            leaves: list[Tensor] = [each.requires_grad_() for each in (q, k, v)]
            with ledger.phase("forward"):
                out, _ = packed_attention(nn.Module(), *leaves, row_lengths=(tokens,), **settings)
            with ledger.phase("backward"):
                out.sum().backward()
        return ledger.peaks["forward"].bytes, ledger.peaks["backward"].bytes

    for short, long in zip(peaks(2048), peaks(4096), strict=True):
        assert short < long <= 2.2 * short
        assert long < 8 * 4096**2 * dtype.itemsize, "probabilities of the whole row"

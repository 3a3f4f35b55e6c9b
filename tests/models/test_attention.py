"""Row attention against torch's own attention with a block mask: outputs, gradients, windows, caps, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.errors import EnvironmentProblem
from lorakeet.models.attention import packed_attention

HEADS, KV, WIDTH = 6, 2, 8
ROWS = (5, 1, 9, 3)
SINKS = torch.linspace(-1, 2, HEADS)


def states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = sum(ROWS)
    return tuple(torch.randn(1, heads, tokens, WIDTH, dtype=dtype).requires_grad_() for heads in (HEADS, KV, KV))


def literal(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cap: float | None = None, sinks: Any = None) -> Tensor:
    """softmax(mask(q·kᵀ/√d))·v with one mask over all tokens; the score of a sink is one more, whose share gives nothing."""
    k, v = (x.repeat_interleave(HEADS // KV, dim=1) for x in (k, v))
    row = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))
    place = torch.arange(sum(ROWS))
    seen = (row[:, None] == row) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    scores = q @ k.transpose(-1, -2) / WIDTH**0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, HEADS, 1, 1).expand(-1, -1, scores.shape[2], -1).to(scores.dtype)], -1)
    return (scores.softmax(-1)[..., : len(row)] @ v).transpose(1, 2)


def both(dtype: torch.dtype, **settings: object) -> list[tuple[Tensor, Tensor]]:
    """(found, expected) of the output and of each gradient."""
    pairs = []
    weights = torch.randn(1, sum(ROWS), HEADS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    for ours in (True, False):
        q, k, v = states(dtype)
        if ours:
            out, extra = packed_attention(nn.Module(), q, k, v, row_lengths=ROWS, scaling=WIDTH**-0.5, **settings)
            assert extra is None
        else:
            rule = [settings.get(name) for name in ("sliding_window", "softcap", "s_aux")]
            out = literal(q.double(), k.double(), v.double(), *rule)  # type: ignore[arg-type]
        (out * weights).sum().backward()
        pairs.append([out.detach(), q.grad, k.grad, v.grad])
    return list(zip(*pairs, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 3}, {"sliding_window": 100}, {"softcap": 2.0}, {"s_aux": SINKS}])
def test_equals_a_block_mask(settings: dict[str, object]) -> None:
    for found, expected in both(torch.float32, **settings):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_softcap_window_and_sinks_together() -> None:
    for found, expected in both(torch.float32, softcap=2.0, sliding_window=3, s_aux=SINKS):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_bf16_keeps_its_dtype_and_rounds_little() -> None:
    for found, expected in both(torch.bfloat16):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected.double(), rtol=3e-2, atol=3e-2)


def test_a_row_does_not_see_its_neighbours() -> None:
    q, k, v = (x.detach() for x in states())
    before = packed_attention(nn.Module(), q, k, v, row_lengths=ROWS)[0]
    v = v.clone()
    v[:, :, 5] += 1  # the only token of the second row
    after = packed_attention(nn.Module(), q, k, v, row_lengths=ROWS)[0]
    changed = (before != after).flatten(2).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [5]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"row_lengths": None}, "row_lengths"),
        ({"row_lengths": (15, 5)}, "20 tokens"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_mask": torch.zeros(1, 1, 18, 18)}, "attention_mask"),
        ({"block_indices": torch.zeros(1, 1, 18, 2)}, "block_indices"),  # MiniMax-M3: which tokens its indexer chose
    ],
)
def test_refuses_what_it_does_not_compute(settings: dict[str, object], word: str) -> None:
    q, k, v = states()
    with pytest.raises(EnvironmentProblem, match=word) as caught:
        packed_attention(nn.Module(), q, k, v, **{"row_lengths": ROWS, **settings})  # type: ignore[arg-type]
    assert "attention: sdpa" in str(caught.value)


def test_keys_that_are_no_token_of_the_rows_are_refused() -> None:
    """DeepSeek-V4 adds keys that summarise earlier tokens: a kernel for rows on a GPU would not read them."""
    q, k, v = (each.detach() for each in states())
    more = [torch.cat([each, each[:, :, :3]], 2) for each in (k, v)]
    with pytest.raises(EnvironmentProblem, match=rf"uses {sum(ROWS) + 3} keys for {sum(ROWS)} queries.*attention: sdpa"):
        packed_attention(nn.Module(), q, *more, row_lengths=ROWS)


def test_a_window_that_only_the_mask_knows_is_refused() -> None:
    module = nn.Module()
    module.config = type("Config", (), {"sliding_window": 8})()
    q, k, v = states()
    with pytest.raises(EnvironmentProblem, match="window of 8 tokens that only its mask has, for a row of 9"):
        packed_attention(module, q, k, v, row_lengths=ROWS)
    packed_attention(module, q, k, v, row_lengths=ROWS, sliding_window=None)  # this layer says that it has none
    module.config.layer_types, module.layer_idx = ["full_attention", "sliding_attention"], 0
    packed_attention(module, q, k, v, row_lengths=ROWS)  # nor has the mask of this one a window
    module.layer_idx = 1  # its mask has the window of the configuration
    found, wanted = (packed_attention(module, q, k, v, row_lengths=ROWS, **own)[0] for own in ({}, {"sliding_window": 8}))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, packed_attention(module, q, k, v, row_lengths=ROWS, sliding_window=None)[0])


def test_values_may_be_narrower_than_keys() -> None:
    q, k, v = states()
    out = packed_attention(nn.Module(), q, k, v[..., :4], row_lengths=ROWS, scaling=WIDTH**-0.5)[0]
    torch.testing.assert_close(out, literal(q, k, v)[..., :4], rtol=1e-4, atol=1e-5)


def test_a_temperature_by_place_is_refused_where_it_is_not_one() -> None:
    """Llama 4's layers without rotary positions count places in the pack, not in the row."""
    module = nn.Module()
    module.attn_temperature_tuning, module.floor_scale, module.use_rope = True, sum(ROWS) + 1, False
    q, k, v = states()
    packed_attention(module, q, k, v, row_lengths=ROWS)
    module.floor_scale -= 1
    with pytest.raises(EnvironmentProblem, match="a temperature by position, constant up to 18, for 18 tokens"):
        packed_attention(module, q, k, v, row_lengths=ROWS)
    module.use_rope = True
    packed_attention(module, q, k, v, row_lengths=ROWS)

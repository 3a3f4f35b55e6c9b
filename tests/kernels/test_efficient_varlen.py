"""Rows by torch's memory-efficient kernel, written out here for the CPU: rows, prefix, windows, padding, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.kernels import efficient_varlen, flash_varlen
from lorakeet.kernels.choose import CANDIDATES, passed_over
from lorakeet.kernels.device import standing_for
from lorakeet.kernels.efficient_varlen import EfficientVarlen
from lorakeet.kernels.flash_varlen import by_definition, proved
from lorakeet.kernels.protocol import Situation
from lorakeet.memory.ledger import Ledger
from lorakeet.models.attention import packed_attention
from tiny.flash import CARD, Flash

CPU = torch.device("cpu")
HEADS, KV = 6, 2
CASES = [
    (rows, prefix, window, filler)
    for rows in ((5, 1, 9, 3), (7,))
    for prefix in (0, 4)
    for window in (None, 3)
    for filler in (0, 2)
]


def states(tokens: int, dtype: torch.dtype, width: int) -> tuple[Tensor, ...]:
    """Q, K, V and a gradient, laid token by token as a model has them."""
    draw = torch.Generator().manual_seed(tokens)
    made = (torch.randn(1, tokens, heads, width, generator=draw) for heads in (HEADS, KV, KV, HEADS))
    return tuple(each.half().to(dtype).transpose(1, 2) for each in made)


def attended(given: tuple[Tensor, ...], rows: tuple[int, ...], prefix: int, window: int | None) -> tuple[Tensor, ...]:
    """O, ∂Q, ∂K, ∂V of the model's attention."""
    leaves = [each.detach().requires_grad_() for each in given[:3]]
    out, _ = packed_attention(nn.Module(), *leaves, row_lengths=rows, row_prefix=prefix, sliding_window=window)
    return out.detach(), *torch.autograd.grad(out, leaves, given[3].transpose(1, 2))


@pytest.mark.parametrize(("rows", "prefix", "window", "filler"), CASES)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 8), (torch.float32, 256)])
def test_float32_is_what_attention_is_defined_to_be(
    flash: Flash, rows: tuple[int, ...], prefix: int, window: int | None, filler: int, dtype: torch.dtype, width: int
) -> None:
    given = states(prefix + sum(rows) + filler, dtype, width)
    found = attended(given, rows, prefix, window)
    assert (flash.efficient_calls, flash.calls) == (1, 0)
    expected = by_definition(given[:3], given[3], (list(rows), prefix, width**-0.5, -1 if window is None else window))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_heads_that_flash_does_not_take_are_taken(flash: Flash) -> None:
    given = states(9, torch.bfloat16, 208)
    found = attended(given, (5, 4), 0, None)
    assert (flash.efficient_calls, flash.calls) == (1, 0) and found[0].dtype == torch.bfloat16
    for number, width in enumerate((64, 192, 256), start=1):  # Gemma's heads have 256
        attended(states(9, torch.bfloat16, width), (5, 4), 0, None)
        assert (flash.efficient_calls, flash.calls) == (1, number), "which comes first where it can run"
    attended(states(9, torch.bfloat16, 264), (5, 4), 0, None)
    assert (flash.efficient_calls, flash.calls) == (2, 3)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [((7, 5), torch.float16, "torch: memory-efficient varlen"), ((7, 5), torch.float32, "torch: memory-efficient varlen"),
     ((8, 6), torch.float32, "torch: memory-efficient varlen"), ((8, 6), torch.bfloat16, "torch: flash varlen"),
     ((7, 5), torch.bfloat16, "torch: blocks of queries"), ((7, 0), torch.float16, "torch: blocks of queries")],
)  # fmt: skip
def test_the_table_chooses_by_the_card_and_the_dtype(
    capability: tuple[int, int], dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for module in (flash_varlen, efficient_varlen):
        module._has_kernel.cache_clear()
    try:
        kernel, skipped = passed_over("attention", Situation(CARD, dtype, dtype))
    finally:
        for module in (flash_varlen, efficient_varlen):
            module._has_kernel.cache_clear()
    assert kernel.name == expected and all(reason for _, reason in skipped)


def test_on_a_cpu_that_stands_for_itself_nothing_is_for_it() -> None:
    assert efficient_varlen.why_not(Situation(CPU, torch.float32, torch.float32)) == "it is a kernel for CUDA GPUs"
    with standing_for(CARD):
        assert not efficient_varlen.takes(torch.zeros(1), HEADS, KV, 64), "numbers on the CPU, for which torch has no such kernel"


def test_the_kernel_is_proved_and_one_that_counts_otherwise_is_left(flash: Flash, caplog: pytest.LogCaptureFixture) -> None:
    about: tuple[Any, ...] = EfficientVarlen, "memory-efficient", CPU, torch.float32
    proved.cache_clear()
    assert proved(*about, (HEADS, KV, 8)) and not caplog.records
    flash.aligned = False
    assert not proved(*about, (2 * HEADS, KV, 8))
    assert caplog.messages[0].startswith("Torch's memory-efficient kernel computes O of rows of [5, 300, 70, 1] tokens behind")
    proved.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_rehearsal_holds_no_probabilities(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row of 2,048 tokens in 32 heads they would be 537 MB in fp32, and kept for the backward pass."""
    monkeypatch.setattr(flash_varlen, "DTYPES", ())  # none, as on a T4
    tokens, heads, kv, width = 2048, 32, 8, 64
    CANDIDATES.clear()
    with Ledger() as ledger, standing_for(CARD):
        q, k, v = (torch.empty(1, tokens, count, width, dtype=dtype).transpose(1, 2) for count in (heads, kv, kv))
        leaves = [each.requires_grad_() for each in (q, k, v)]
        with ledger.phase("forward"):
            out, _ = packed_attention(nn.Module(), *leaves, row_lengths=(tokens,))
        with ledger.phase("backward"):
            out.sum().backward()
    CANDIDATES.clear()
    state = tokens * heads * width
    probabilities = heads * tokens * tokens * dtype.itemsize
    assert ledger.peaks["forward"].bytes < 6 * state * dtype.itemsize < probabilities
    assert ledger.peaks["backward"].bytes < 40 * state * 4 < 3 * heads * tokens * tokens * 4
    scores = tokens * (tokens + 1) // 2
    flops = ledger.work["forward"].flops, ledger.work["backward"].flops
    assert flops == (4 * scores * heads * width, 10 * scores * heads * width)

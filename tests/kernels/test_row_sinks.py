"""Sinks beside a varlen kernel, written out here for the CPU: results and every gradient, also the sinks' own; and the proof."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lorakeet.kernels.device import standing_for
from lorakeet.kernels.efficient_varlen import EfficientVarlen
from lorakeet.kernels.flash_varlen import FlashVarlen
from lorakeet.kernels.row_sinks import SinkRows, sinks_proved
from lorakeet.models.attention import packed_attention
from tiny.flash import CARD, Flash

CPU = torch.device("cpu")
HEADS, KV, WIDTH = 6, 2, 8
ROWS = (5, 1, 19, 3)


@pytest.fixture(autouse=True)
def proved_anew() -> Iterator[None]:
    sinks_proved.cache_clear()
    yield
    sinks_proved.cache_clear()


def states(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(tokens)
    made = (torch.randn(1, tokens, heads, WIDTH, generator=draw) for heads in (HEADS, KV, KV, HEADS))
    return tuple(each.bfloat16().to(dtype).transpose(1, 2) for each in made)


def attended(
    device: torch.device, dtype: torch.dtype, prefix: int, window: int | None, filler: int
) -> tuple[Tensor, ...]:
    """O, ∂Q, ∂K, ∂V and the sinks' gradient of a model's attention; nothing is asked of the filling tokens."""
    *qkv, grad = states(prefix + sum(ROWS) + filler, dtype)
    real = prefix + sum(ROWS)
    grad[:, :, real:] = 0
    leaves = [each.detach().requires_grad_() for each in (*qkv, torch.linspace(-2, 3, HEADS))]
    laid = {"row_lengths": ROWS, "row_prefix": prefix, "sliding_window": window, "s_aux": leaves[3]}
    with standing_for(device):
        out, _ = packed_attention(nn.Module(), *leaves[:3], **laid)
    return out.detach()[:, :real], *torch.autograd.grad(out, leaves, grad.transpose(1, 2))


@pytest.mark.parametrize("filler", [0, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefix", [0, 4])
def test_results_and_gradients_are_those_of_the_formula(flash: Flash, prefix: int, window: int | None, filler: int) -> None:
    found = attended(CARD, torch.float32, prefix, window, filler)
    assert (flash.efficient_calls, flash.calls) == (1, 0)
    for mine, theirs in zip(found, attended(CPU, torch.float32, prefix, window, filler), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 4])
def test_the_flash_kernel_has_them_too(flash: Flash, prefix: int) -> None:
    found = attended(CARD, torch.bfloat16, prefix, None, 2)
    assert (flash.efficient_calls, flash.calls) == (0, 1)
    for mine, theirs in zip(found, attended(CPU, torch.float32, prefix, None, 2), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=3e-2, atol=3e-2)


def test_frozen_sinks_get_no_gradient(flash: Flash) -> None:
    q, k, v, _ = (each.detach().requires_grad_() for each in states(sum(ROWS)))
    out = SinkRows.apply(q, k, v, torch.zeros(HEADS), EfficientVarlen(ROWS, WIDTH**-0.5))
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("kernel", [FlashVarlen, EfficientVarlen])
def test_a_kernel_whose_log_sums_are_others_is_left_with_a_word(
    kernel: type[FlashVarlen], flash: Flash, caplog: pytest.LogCaptureFixture
) -> None:
    dtype = torch.bfloat16 if kernel is FlashVarlen else torch.float32
    assert sinks_proved(kernel, CPU, dtype, (4, 2, 16)) and not caplog.records
    flash.unit = math.log(2)
    assert not sinks_proved(kernel, CPU, dtype, (8, 2, 16))
    assert "computes O of rows with sinks otherwise than attention is defined on cpu" in caplog.messages[0]
    assert "by blocks of queries, which is slower" in caplog.messages[0] and len(caplog.messages) == 1


def test_without_the_proof_blocks_of_queries_compute_them(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakeet.models import attention

    monkeypatch.setattr(attention, "takes_sinks", lambda *_: False)
    found = attended(CARD, torch.float32, 4, None, 0)
    assert flash.calls == flash.efficient_calls == 0
    for mine, theirs in zip(found, attended(CPU, torch.float32, 4, None, 0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

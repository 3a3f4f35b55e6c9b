"""Rows by torch's flash kernel, written out here for the CPU: places, prefix, windows, what fills up, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.fused.attention import RotaryAttention
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.kernels import flash_varlen
from lorakeet.kernels.device import standing_for
from lorakeet.kernels.flash_varlen import (
    FlashVarlen,
)
from lorakeet.kernels.protocol import Situation
from lorakeet.memory.ledger import Ledger
from lorakeet.models.attention import packed_attention
from lorakeet.models.inject import trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.train.text.loss import text_loss
from tiny.flash import CARD, Flash
from tiny.models import save_tiny_llama

CPU = torch.device("cpu")
HEADS, KV, WIDTH, LONGEST = 6, 2, 8, 12
CASES = [
    (rows, prefix, window, filler)
    for rows in ((5, 1, 9, 3), (7,))
    for prefix in (0, 4)
    for window in (None, 3, 100)
    for filler in (0, 2)
]


def states(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Q, K, V and a gradient, laid token by token as a model has them."""
    draw = torch.Generator().manual_seed(tokens)
    made = (torch.randn(1, tokens, heads, WIDTH, generator=draw) for heads in (HEADS, KV, KV, HEADS))
    return tuple(each.bfloat16().to(dtype).transpose(1, 2) for each in made)


def attended(given: tuple[Tensor, ...], rows: tuple[int, ...], prefix: int, window: int | None) -> tuple[Tensor, ...]:
    """O, ∂Q, ∂K, ∂V of the model's attention."""
    *qkv, grad = given
    real = prefix + sum(rows)  # what fills up is nobody's
    grad[:, :, real:] = 0
    leaves = [each.detach().requires_grad_() for each in qkv]
    laid = {"row_lengths": rows, "row_prefix": prefix, "sliding_window": window, "scaling": WIDTH**-0.5}
    out, _ = packed_attention(nn.Module(), *leaves, **laid)
    return out.detach()[:, :real], *torch.autograd.grad(out, leaves, grad.transpose(1, 2))


@pytest.mark.parametrize(("rows", "prefix", "window", "filler"), CASES)
def test_all_rows_at_once_are_what_they_are_one_by_one(
    flash: Flash, rows: tuple[int, ...], prefix: int, window: int | None, filler: int
) -> None:
    tokens = prefix + sum(rows) + filler
    found = attended(states(tokens), rows, prefix, window)
    assert flash.calls == 1
    expected = attended(states(tokens, torch.float32), rows, prefix, window)  # fp32: row by row
    assert flash.calls == 1
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rows", "prefix", "window", "filler"), CASES)
def test_the_definition_that_proves_the_kernel_is_that_of_attention(
    rows: tuple[int, ...], prefix: int, window: int | None, filler: int
) -> None:
    given = states(prefix + sum(rows) + filler, torch.float32)
    with standing_for(CARD):
        expected = attended(given, rows, prefix, window)
    laid = list(rows), prefix, WIDTH**-0.5, -1 if window is None else window
    out, *found = flash_varlen.by_definition(given[:3], given[3], laid)
    for mine, theirs in zip((out[:, : prefix + sum(rows)], *found), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def trained(folder: Path, dtype: str) -> tuple[TextModel, float, dict[str, Tensor]]:
    """A model with pairs that are not zero, the loss of rows that begin alike, and its gradients."""
    text = load_text_model(ModelSpec(path=str(folder), dtype=dtype, products=dtype, device="cpu"))  # type: ignore[arg-type]
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4, alpha=12.0), text.family), seed=1)
    parameters = trained_parameters(text.model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".B"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    text.model.train()
    ids = [np.concatenate([np.arange(4, 14), np.arange(20 + n, 40 + 2 * n)]) for n in range(3)]
    rows = [Example(one, np.arange(len(one)) >= 12, str(n), None, False) for n, one in enumerate(ids)]
    loss, _ = text_loss(text, pack_examples(rows))
    loss.backward()  # type: ignore[no-untyped-call]
    return text, loss.item(), {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def test_a_model_trains_by_it_as_row_by_row(flash: Flash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a block forward, q, k and v fused with their pairs; the gradients are those of fp32 to the rounding of bf16."""
    folder = save_tiny_llama(tmp_path / "model", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    text, loss, grads = trained(folder, "float32")
    assert flash.calls == 0
    seen: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setattr(FlashVarlen, "forward", _noting(FlashVarlen.forward, seen))
    fused: list[Any] = []
    inputs = RotaryAttention._inputs
    monkeypatch.setattr(RotaryAttention, "_inputs", lambda *given: fused.append(inputs(*given)) or fused[-1])
    narrow, narrow_loss, narrow_grads = trained(folder, "bfloat16")
    blocks = text.model.config.num_hidden_layers
    assert seen[-blocks:] == [((20, 21, 22), 10)] * blocks  # of the training pass: behind the prefix that they share
    assert isinstance(narrow.model.model.layers[0].self_attn, RotaryAttention)
    assert all(found is not None and isinstance(found.kernel, FlashVarlen) for found, _ in fused[-blocks:])
    assert abs(narrow_loss - loss) < 0.02 * abs(loss)
    assert narrow_grads.keys() == grads.keys() and len(grads) == 14 * blocks
    for name, grad in grads.items():
        assert torch.cosine_similarity(grad.flatten(), narrow_grads[name].flatten(), dim=0) > 0.98, name


def _noting(forward: Any, seen: list[Any]) -> Any:
    def noted(kernel: FlashVarlen, *states: Tensor) -> Any:
        seen.append((tuple(kernel.laid[0]), kernel.laid[1]))
        return forward(kernel, *states)

    return noted


def test_a_prefix_gets_the_gradient_of_every_row_summed_in_fp32(flash: Flash) -> None:
    """256 equal rows: bf16, which has 8 bits, would stop adding a part to the sum of as many before."""
    rows, prefix = (1,) * 256, 1
    one = [torch.zeros(1, heads, 1 + len(rows), WIDTH, dtype=torch.bfloat16) for heads in (HEADS, KV, KV)]
    grad = torch.ones(1, HEADS, 1 + len(rows), WIDTH, dtype=torch.bfloat16)
    *_, of_v = attended((*one, grad), rows, prefix, None)
    half = HEADS // KV / 2  # of each row's gradient, which sees the prefix and itself
    assert torch.equal(of_v[0, :, 0], torch.full((KV, WIDTH), 2 * half + 256 * half).bfloat16())
    assert torch.equal(of_v[0, :, 1:], torch.full((KV, 256, WIDTH), half).bfloat16())


@pytest.mark.parametrize("widths", [(4, 4), (8, 4), (4, 8), (12, 5)])
def test_heads_of_other_widths_are_padded(flash: Flash, widths: tuple[int, int]) -> None:
    """Of queries and keys, and of values: DeepSeek's are narrower."""
    draw = torch.Generator().manual_seed(0)
    sizes = (HEADS, widths[0]), (KV, widths[0]), (KV, widths[1])
    made = [torch.randn(1, heads, 18, width, generator=draw) for heads, width in sizes]
    found = []
    for dtype, calls in ((torch.bfloat16, 1), (torch.float64, 1)):  # which no kernel takes
        leaves = [each.to(dtype).requires_grad_() for each in made]
        out, _ = packed_attention(nn.Module(), *leaves, row_lengths=(10, 8))
        assert flash.calls == calls and flash.efficient_calls == 0 and out.shape == (1, 18, HEADS, widths[1])
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=5e-2, atol=5e-2)


def test_states_that_the_kernel_does_not_take_go_another_way(flash: Flash) -> None:
    q, k, v, _ = states(18)
    for settings in ({"softcap": 2.0}, {"dropout": 0.5}):
        packed_attention(nn.Module(), q, k, v, row_lengths=(18,), **settings)
    assert flash.calls == flash.efficient_calls == 0
    wide = [torch.zeros(1, 1, 2, 224, dtype=torch.bfloat16)] * 3  # without a backward pass on some GPUs
    packed_attention(nn.Module(), *wide, row_lengths=(2,))
    assert flash.calls == 0 and flash_varlen.takes(q, HEADS, KV, WIDTH)


def test_on_a_cpu_that_stands_for_itself_nothing_is_for_it() -> None:
    assert flash_varlen.why_not(Situation(CPU, torch.bfloat16, torch.bfloat16)) == "it is a kernel for CUDA GPUs"


def test_the_kernel_is_proved_and_one_that_counts_otherwise_is_left(
    flash: Flash, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_varlen.proved.cache_clear()
    with torch.inference_mode():
        assert flash_varlen.matches_definition(CPU, torch.bfloat16, HEADS, KV, WIDTH)
    assert flash_varlen.matches_definition(CPU, torch.float16, HEADS, HEADS, WIDTH) and not caplog.records
    flash.aligned = False
    for _ in range(2):
        assert not flash_varlen.matches_definition(CPU, torch.bfloat16, 2 * HEADS, KV, WIDTH)
    (said,) = caplog.messages
    assert "computes O of rows of [5, 300, 70, 1] tokens behind 140 shared ones otherwise than attention is defined" in said
    monkeypatch.setattr(flash, "refuses", True)
    assert not flash_varlen.matches_definition(CPU, torch.bfloat16, 3 * HEADS, KV, WIDTH)
    assert "does not run: no kernel image is available" in caplog.messages[1]
    flash_varlen.proved.cache_clear()


def test_a_rehearsal_counts_what_the_kernel_computes_and_holds() -> None:
    rows, prefix = (30, 20), 6
    tokens = prefix + sum(rows)
    with Ledger() as ledger, standing_for(CARD):
        q, k, v = (torch.empty(1, tokens, heads, 64, dtype=torch.bfloat16).transpose(1, 2) for heads in (HEADS, KV, KV))
        leaves = [each.requires_grad_() for each in (q, k, v)]
        with ledger.phase("forward"):
            out, _ = packed_attention(nn.Module(), *leaves, row_lengths=rows, row_prefix=prefix)
        with ledger.phase("backward"):
            out.sum().backward()
    scores = 36 * 37 // 2 + 20 * 21 // 2 + 20 * 6
    assert ledger.work["forward"].flops == 4 * scores * HEADS * 64
    assert ledger.work["backward"].flops == 10 * scores * HEADS * 64
    sums = 4 * (tokens + 3 * 128) * HEADS * 65
    expanded = 2 * (6 + 36 + 26) * HEADS * 64 * 2
    of_prefix = 4 * (6 + 36 + 26) * KV * 64 * 2 + 6 * KV * 64 * (2 * 2 + 12)
    results = (HEADS + 2 * KV + 2 * HEADS) * tokens * 64 * 2  # ∂Q, ∂K, ∂V, and ∂O as it came and as it is handed on
    grown = ledger.peaks["backward"].bytes - ledger.peaks["forward"].bytes
    assert sums + expanded + of_prefix < grown <= sums + expanded + of_prefix + results

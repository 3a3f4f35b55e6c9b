"""Attention by blocks of queries, of capped scores and with dropout: it is the formula written out, and holds one block of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.kernels import blockwise_rows, flash_varlen
from lorakeet.kernels.blockwise_rows import BlockwiseRows, query_blocks
from lorakeet.kernels.cpu.operators import WORKSPACES
from lorakeet.kernels.device import standing_for
from lorakeet.kernels.protocol import Situation
from lorakeet.memory.ledger import Ledger
from lorakeet.models.attention import packed_attention
from tiny.flash import CARD
from tiny.simulated_card import simulated_card

CPU = torch.device("cpu")
HEADS, KV, WIDTH = 6, 2, 8
RULES: dict[str, dict[str, Any]] = {
    "plain": {}, "cap": {"cap": 2.0}, "window": {"window": 3}, "cap and window": {"cap": 2.0, "window": 3},
    "dropout": {"dropout": 0.25, "seed": 7}, "all": {"cap": 2.0, "window": 3, "dropout": 0.25, "seed": 7},
}  # fmt: skip
ROWS = (5, 1, 19, 3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a row, several rows in a block."""
    forget()
    monkeypatch.setattr(blockwise_rows, "MOST", 12)
    monkeypatch.setattr(blockwise_rows, "SHARED", 8)
    monkeypatch.setattr(blockwise_rows, "LEAST", 2)
    monkeypatch.setattr(blockwise_rows, "SCORES", 8 * HEADS * 16)


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    forget()


def forget() -> None:
    for cached in (blockwise_rows.query_blocks, blockwise_rows.keys_seen, flash_varlen.sequences):
        cached.cache_clear()


def states(tokens: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> tuple[Tensor, ...]:
    """Q, K, V and a gradient, laid token by token as a model has them."""
    draw = torch.Generator().manual_seed(tokens)
    made = (torch.randn(1, tokens, heads, width, generator=draw) for heads in (HEADS, KV, KV, HEADS))
    return tuple(each.to(dtype).transpose(1, 2) for each in made)


def kept(rows: tuple[int, ...], prefix: int, tokens: int, rule: dict[str, Any]) -> Tensor:
    """What dropout leaves (heads, tokens, keys of all sequences), gathered from its blocks."""
    kernel = BlockwiseRows(rows, 1.0, prefix, rule.get("window"), rule.get("cap"), rule["dropout"], rule["seed"])
    found = torch.zeros(HEADS, tokens, prefix * (len(rows) + 1) + tokens)
    for number, block in enumerate(query_blocks(rows, prefix, tokens, kernel.laid[3], HEADS)):
        shape = KV, HEADS // KV * len(range(*block.queries.indices(tokens))), block.keys.stop - block.keys.start
        own = blockwise_rows._kept(torch.empty(shape), kernel.laid, number)
        found[:, block.queries, block.keys] = own.view(HEADS, -1, shape[2])
    return found


def written_out(given: tuple[Tensor, ...], rows: tuple[int, ...], prefix: int, rule: dict[str, Any]) -> tuple[Tensor, ...]:
    """O (1, tokens, heads, d), ∂Q, ∂K, ∂V: softmax(cap·tanh(s·Q·Kᵀ / cap) + mask)·V of each row in fp64, dropped as the kernel
    drops."""
    q, k, v = (each.detach().double().requires_grad_() for each in given[:3])
    tokens, at, key_at, outs = q.shape[2], 0, 0, []
    parts = [*([prefix] if prefix else []), *rows]
    parts += [tokens - sum(parts)] * (sum(parts) < tokens)
    drops = kept(rows, prefix, tokens, rule) if "dropout" in rule else None
    for number, length in enumerate(parts):
        shares_prefix = bool(prefix) and 0 < number <= len(rows)
        seen = [*(range(prefix) if shares_prefix else ()), *range(at, at + length)]
        keys, values = (each[:, :, seen].repeat_interleave(HEADS // KV, 1) for each in (k, v))
        scores = q[:, :, at : at + length] @ keys.transpose(2, 3) * WIDTH**-0.5
        if "cap" in rule:
            scores = rule["cap"] * torch.tanh(scores / rule["cap"])
        distance = torch.arange(len(seen) - length, len(seen))[:, None] - torch.arange(len(seen))
        hidden = (distance < 0) | (distance >= rule.get("window", tokens))
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        if drops is not None:
            shares = shares * drops[:, at : at + length, key_at : key_at + len(seen)]
        outs.append(shares @ values)
        at, key_at = at + length, key_at + len(seen)
    out = torch.cat(outs, 2)
    return out.detach().transpose(1, 2), *torch.autograd.grad(out, (q, k, v), given[3].double())


@pytest.mark.parametrize("filler", [0, 2])
@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_formula_written_out(rule: str, prefix: int, filler: int) -> None:
    given, rows = states(prefix + sum(ROWS) + filler), ROWS
    kernel = BlockwiseRows(rows, WIDTH**-0.5, prefix, **RULES[rule])
    assert len(query_blocks(rows, prefix, prefix + sum(rows) + filler, kernel.laid[3], HEADS)) > 3
    out, saved = kernel.forward(*given[:3])
    found = out, *kernel.backward(given[3].transpose(1, 2), *given[:3], *saved)
    for mine, theirs in zip(found, written_out(given, rows, prefix, RULES[rule]), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_narrow_states_give_narrow_results_that_are_as_near_as_rounding_allows() -> None:
    given = states(sum(ROWS), torch.bfloat16)
    kernel = BlockwiseRows(ROWS, WIDTH**-0.5, 0, None, 2.0)
    out, saved = kernel.forward(*given[:3])
    found = out, *kernel.backward(given[3].transpose(1, 2), *given[:3], *saved)
    for mine, theirs in zip(found, written_out(given, ROWS, 0, {"cap": 2.0}), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), theirs, rtol=3e-2, atol=3e-2)


def test_products_that_float16_cannot_hold_do_not_overflow() -> None:
    """Queries and keys of 100 give scores of 80,000 before they are scaled, beyond the largest number of float16."""
    with simulated_card() as card:
        q, k = (torch.full((1, heads, 9, WIDTH), 100.0, dtype=torch.float16).to("cuda") for heads in (HEADS, KV))
        v = states(9, torch.float16)[2].to("cuda")
        leaves = [each.requires_grad_() for each in (q, k, v)]
        out, _ = packed_attention(nn.Module(), *leaves, row_lengths=(9,), softcap=40000.0)
        found = out, *torch.autograd.grad(out.sum(), leaves)
        assert all(each.cpu().isfinite().all() for each in found) and card.flash.calls == 0
        sums = v[0].cpu().float().cumsum(1) / torch.arange(1, 10)[:, None]  # all scores are equal
    assert torch.allclose(out.cpu()[0].float(), sums.repeat_interleave(HEADS // KV, 0).transpose(0, 1), atol=1e-2)


def test_a_model_s_attention_takes_it_on_a_card_and_its_gradients_are_those_of_the_cpu() -> None:
    for settings in ({"softcap": 2.0}, {"softcap": 2.0, "sliding_window": 3}, {"softcap": 2.0, "s_aux": torch.arange(6.0)}):
        found = []
        for device in (CPU, CARD):
            given = states(sum(ROWS))
            leaves = [each.detach().requires_grad_() for each in given[:3]]
            with standing_for(device):
                out, _ = packed_attention(nn.Module(), *leaves, row_lengths=ROWS, **settings)
            found.append((out.detach(), *torch.autograd.grad(out, leaves, given[3].transpose(1, 2))))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_dropped_follows_from_the_seed_alone_and_is_drawn_anew_by_each_call() -> None:
    q, k, v, _ = states(sum(ROWS))
    outs = [BlockwiseRows(ROWS, 1.0, 0, None, None, 0.5, seed).forward(q, k, v)[0] for seed in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    torch.manual_seed(3)
    with standing_for(CARD):
        calls = [packed_attention(nn.Module(), q, k, v, row_lengths=ROWS, dropout=0.5)[0] for _ in range(2)]
        torch.manual_seed(3)
        again = packed_attention(nn.Module(), q, k, v, row_lengths=ROWS, dropout=0.5)[0]
    assert torch.equal(again, calls[0]) and not torch.equal(calls[0], calls[1])


def test_every_key_that_a_query_sees_is_in_its_block_and_none_is_there_for_nothing() -> None:
    for window in (-1, 3):
        first, last = blockwise_rows._seen(ROWS, 4, 34, window)
        blocks = query_blocks(ROWS, 4, 34, window, HEADS)
        assert [number for block in blocks for number in range(34)[block.queries]] == list(range(34))
        for block in blocks:
            assert block.keys.start == first[block.queries].min() and block.keys.stop == last[block.queries].max() + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("most", [64, 256])
def test_its_workspace_is_what_is_planned(
    rule: str, dtype: torch.dtype, prefix: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never less, and at most 0.6 more: a plan holds for any rows of at most that length."""
    monkeypatch.setattr(blockwise_rows, "MOST", most)
    monkeypatch.setattr(blockwise_rows, "SHARED", 64)
    monkeypatch.setattr(blockwise_rows, "LEAST", 16)
    monkeypatch.setattr(blockwise_rows, "SCORES", most * HEADS * 400)
    rows = (300, 300)
    kernel = BlockwiseRows(rows, 0.1, prefix, **RULES[rule])
    with Ledger() as ledger:
        q, k, v, grad = (torch.empty(prefix + 600, heads, 32, dtype=dtype) for heads in (HEADS, KV, KV, HEADS))
        before = ledger.bytes
        with ledger.phase("forward"):
            out, logs = blockwise_rows.blockwise_rows(q, k, v, *kernel.laid)
        kept_bytes = ledger.bytes - before
        with ledger.phase("backward"):
            found = blockwise_rows.blockwise_rows_backward(grad, q, k, v, out, logs, *kernel.laid)
        results = sum(each.nbytes for each in found)
    taken = ledger.peaks["forward"].bytes - before - kept_bytes
    planned = WORKSPACES[blockwise_rows.BLOCKWISE_ROWS](q, k, v, *kernel.laid)
    assert taken <= planned <= 1.6 * taken
    taken = ledger.peaks["backward"].bytes - before - kept_bytes - results
    planned = WORKSPACES[blockwise_rows.BLOCKWISE_ROWS_BACKWARD](grad, q, k, v, out, logs, *kernel.laid)
    assert taken <= planned <= 1.6 * taken


def test_a_rehearsal_counts_the_products_that_are_computed() -> None:
    with Ledger() as ledger, standing_for(CARD):
        q, k, v = (torch.empty(1, 40, heads, 64).transpose(1, 2) for heads in (HEADS, KV, KV))
        leaves = [each.requires_grad_() for each in (q, k, v)]
        with ledger.phase("forward"):
            out, _ = packed_attention(nn.Module(), *leaves, row_lengths=(30, 10), softcap=5.0)
        with ledger.phase("backward"):
            out.sum().backward()
    scores = sum(block.scores(HEADS) for block in query_blocks((30, 10), 0, 40, -1, HEADS))
    flops = ledger.work["forward"].flops, ledger.work["backward"].flops
    assert flops == (4 * scores * 64, 10 * scores * 64)


def test_it_is_for_gpus() -> None:
    assert blockwise_rows.why_not(Situation(CPU, torch.float32, torch.float32)) == "it is a kernel for CUDA GPUs"
    assert not blockwise_rows.why_not(Situation(CARD, torch.float32, torch.float32))
    assert not blockwise_rows.why_not(Situation(CPU, torch.float32, torch.float32, rehearsed=True))


def test_on_amd_gpus_torch_s_own_attention_comes_first_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blockwise_rows.takes(torch.empty(1, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not blockwise_rows.takes(torch.empty(1, dtype=torch.bfloat16)) and blockwise_rows.takes(torch.empty(1))

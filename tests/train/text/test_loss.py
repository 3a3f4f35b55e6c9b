"""The chunked loss against the plain one, for the frozen head and for any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.data.pack import pack_examples
from lorakeet.kernels import choose
from lorakeet.kernels.cpu import dense, operators
from lorakeet.train.text import loss as module
from lorakeet.train.text.loss import any_head_losses, frozen_head_losses, text_loss
from tiny.native import needs_native
from train.tiny_task import TinyText, examples


def parts(
    count: int = 23, vocab: int = 31, hidden: int = 8, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    h = (torch.randn(count, hidden, generator=generator) * 2).to(dtype).requires_grad_(True)
    w = torch.randn(vocab, hidden, generator=generator).to(dtype)
    return h, w, torch.randint(vocab, (count,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 5, 23, 256])
def test_frozen_head_equals_the_plain_loss(chunk: int) -> None:
    hidden, weight, targets = parts(dtype=torch.float64)
    loss = frozen_head_losses(hidden, weight, targets, chunk=chunk).sum()
    (grad,) = torch.autograd.grad(loss / 7, hidden)
    expected = plain(hidden, weight, targets)
    (expected_grad,) = torch.autograd.grad(expected / 7, hidden)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, targets = parts(5, 7, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: frozen_head_losses(h, weight, targets, chunk=2), (hidden,))


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = parts()
    loss = frozen_head_losses(hidden * 1e4, weight, targets, chunk=4).sum()
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_bf16_states_give_an_fp32_loss() -> None:
    hidden, weight, targets = parts(dtype=torch.bfloat16)
    loss = frozen_head_losses(hidden, weight, targets, chunk=6).sum()
    assert loss.dtype == torch.float32
    grad = torch.autograd.grad(loss, hidden)[0]
    assert grad.dtype == torch.bfloat16
    exact = hidden.detach().float().requires_grad_(True)
    expected = plain(exact, weight.float(), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    torch.testing.assert_close(grad.float(), torch.autograd.grad(expected, exact)[0], rtol=0.1, atol=0.05)


@needs_native
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_logits_of_several_tiles_in_bf16(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library, and, as with AMX, with products of torch: what torch's own operations make of the same logits."""
    hidden, weight, targets = parts(9, 20_005, 64, dtype=torch.bfloat16)
    targets[:4] = torch.tensor([8191, 8192, 20_004, 0])
    with operators.torch_only():
        wanted = frozen_head_losses(hidden, weight, targets, chunk=chunk)
        (grad,) = torch.autograd.grad(wanted.sum(), hidden)
    for multiplies in (True, False):
        monkeypatch.setattr(dense, "multiplies", lambda own=multiplies: own)
        monkeypatch.setattr(choose, "CANDIDATES", {})
        losses = frozen_head_losses(hidden, weight, targets, chunk=chunk)
        torch.testing.assert_close(losses, wanted, rtol=2e-3, atol=1e-4)  # sums in another order round some logits otherwise
        found = torch.autograd.grad(losses.sum(), hidden)[0]
        assert float((found.float() - grad.float()).norm() / grad.float().norm()) < 4e-3


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = parts()
    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: calls.append(a.shape) or real(a, b))
    with torch.no_grad():
        frozen_head_losses(hidden, weight, targets, chunk=8).sum()
    assert len(calls) == 3  # one product per chunk, and no second one for a gradient


def test_any_head_trains_the_head_too() -> None:
    hidden, weight, targets = parts(dtype=torch.float64)
    trained = weight.clone().requires_grad_(True)
    chunked = any_head_losses(hidden, lambda h: 3 * torch.tanh(h @ trained.t() / 3), targets, chunk=5).sum()
    logits = 3 * torch.tanh(hidden @ trained.t() / 3)
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-12)
    for got, expected in zip(
        torch.autograd.grad(chunked, [hidden, trained]), torch.autograd.grad(whole, [hidden, trained]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_of_all_targets_by_vocabulary(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    """Whatever autograd keeps, and every product on the way, has at most `chunk` rows of logits."""
    hidden, weight, targets = parts(count=64, vocab=101)
    seen: list[tuple[int, ...]] = []
    loss_of = frozen_head_losses if frozen else lambda h, w, t, chunk: any_head_losses(h, lambda x: x @ w.t(), t, chunk=chunk)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        loss_of(hidden, weight, targets, chunk=8).sum().backward()
    assert all(shape[0] <= 8 for shape in seen if len(shape) == 2 and shape[1] == 101)
    if frozen:
        assert not [shape for shape in seen if len(shape) == 2 and shape[1] == 101]


def test_text_loss_counts_supervised_tokens_only() -> None:
    text = TinyText()
    batch = pack_examples(examples(4, seed=1))
    loss, count = text_loss(text, batch, chunk=3)
    assert count == batch.targets < batch.tokens
    hidden = text.hidden(batch)
    assert loss.item() == pytest.approx(plain(hidden, text.head_weight, batch.target_ids).item(), rel=1e-5)
    text.head_weight, weight = None, text.head_weight  # type: ignore[assignment]
    text.head = lambda hidden: hidden @ weight.t()  # type: ignore[method-assign]
    assert text_loss(text, batch, chunk=3)[0].item() == pytest.approx(loss.item(), rel=1e-5)
    assert module.CHUNK == 256

"""The Triton kernel of the loss, in Triton's interpreter, against torch's cross-entropy in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.train.text.loss import frozen_head_losses
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, and their gradients."""
    wide = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def logits_of(rows: int, vocabulary: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=chance) * spread
    return logits.to(DEVICE), torch.randint(vocabulary, (rows,), generator=chance).to(DEVICE)


@pytest.mark.parametrize("spread", [0.1, 3.0, 1e4])
@pytest.mark.parametrize("vocabulary", [1, 31, 4096, 9001])  # also more than one part, and a last part that is not full
def test_losses_and_gradients(vocabulary: int, spread: float) -> None:
    from lorakeet.kernels.triton.loss import loss_in_place

    logits, targets = logits_of(3, vocabulary, spread)
    expected, gradient = exact(logits, targets)
    before = logits.clone()
    losses = loss_in_place(logits, targets, wants_grad=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6 * max(1.0, spread))
    assert torch.equal(loss_in_place(logits, targets, wants_grad=True), losses)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_words_that_are_ruled_out_and_what_is_no_number() -> None:
    from lorakeet.kernels.triton.loss import loss_in_place

    logits, targets = logits_of(4, 40)
    targets[:] = 3
    logits[0, 5:] = -torch.inf
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    expected, gradient = exact(logits, targets)
    with np.errstate(invalid="ignore"):
        losses = loss_in_place(logits, targets, wants_grad=True)
    assert bool(losses[1:3].isnan().all()) and bool(expected[1:3].isnan().all())
    torch.testing.assert_close(losses[[0, 3]].double(), expected[[0, 3]])
    torch.testing.assert_close(logits[[0, 3]].double(), gradient[[0, 3]], rtol=1e-5, atol=1e-6)


def test_rows_may_lie_apart_and_others_are_left_alone() -> None:
    from lorakeet.kernels.triton.loss import loss_in_place

    whole, targets = logits_of(4, 48)
    before, part = whole.clone(), whole[1:3, :31]
    targets = targets[1:3] % 31
    expected, gradient = exact(part, targets)
    torch.testing.assert_close(loss_in_place(part, targets, wants_grad=True).double(), expected)
    torch.testing.assert_close(part.double(), gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[:, 31:], before[:, 31:]) and torch.equal(whole[[0, 3]], before[[0, 3]])


def test_a_target_that_is_no_word_reads_nothing_and_gives_nan() -> None:
    from lorakeet.kernels.triton.loss import loss_in_place

    logits, targets = logits_of(4, 40)
    expected, gradient = exact(logits, targets)
    targets[1], targets[2] = 40, -1  # in rows whose neighbours have words at those places
    losses = loss_in_place(logits, targets, wants_grad=True)
    assert losses.isnan().tolist() == [False, True, True, False] and bool(logits[1:3].isnan().all())
    torch.testing.assert_close(losses[[0, 3]].double(), expected[[0, 3]])
    torch.testing.assert_close(logits[[0, 3]].double(), gradient[[0, 3]], rtol=1e-5, atol=1e-6)


def test_targets_may_lie_apart_and_the_logits_of_a_row_may_not() -> None:
    from lorakeet.kernels.triton.loss import loss_in_place

    logits, targets = logits_of(4, 40)
    expected, _ = exact(logits, targets)
    apart = torch.stack([targets, (targets + 1) % 40], dim=1)[:, 0]
    assert apart.stride() == (2,)
    torch.testing.assert_close(loss_in_place(logits, apart, wants_grad=False).double(), expected)
    with pytest.raises(ValueError, match="are 4 numbers apart; expected contiguous rows"):
        loss_in_place(logits.t().contiguous().t(), targets, wants_grad=False)
    with pytest.raises(ValueError, match=r"targets \(3,\)"):
        loss_in_place(logits, targets[:3], wants_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_is_the_same_through_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=chance).to(dtype).to(DEVICE).requires_grad_()
    weight = torch.randn(70, 8, generator=chance).to(dtype).to(DEVICE)
    targets = torch.randint(70, (23,), generator=chance).to(DEVICE)
    calls: list[int] = []
    from lorakeet.kernels.triton.loss import loss_in_place as launch

    monkeypatch.setattr("lorakeet.kernels.triton.loss.loss_in_place", lambda *a, **more: calls.append(1) or launch(*a, **more))
    found = []
    for kernels in (None, TritonRequest()):
        loss = frozen_head_losses(hidden, weight, targets, chunk=5, kernels=kernels).sum()
        found.append((loss, torch.autograd.grad(loss / 7, hidden)[0]))
    assert len(calls) == 5
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)

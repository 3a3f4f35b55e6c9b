"""Losses of logits in tiles, and their gradients, against the same in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.kernels.cpu.head import HEAD_LOSSES, blocks
from lorakeet.memory.ledger import Ledger
from tiny.native import needs_native

pytestmark = needs_native


def case(tokens: int, vocabulary: int, tile: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as they are, the same in tiles, and targets, among which are the first and the last word."""
    generator = torch.Generator().manual_seed(vocabulary)
    plain = (torch.randn(tokens, vocabulary, generator=generator) * scale).bfloat16()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[:2] = torch.tensor([0, vocabulary - 1])[:tokens]
    tiled = torch.empty_like(plain)
    for part, block in blocks(tiled, tile):
        block.copy_(plain[:, part])
    return plain, tiled, targets


SIZES = [(5, 64, 16), (3, 1000, 256), (7, 37, 16), (2, 16, 64), (9, 8200, 8192), (1, 3, 8)]


@pytest.mark.parametrize(("tokens", "vocabulary", "tile"), SIZES)
def test_losses_and_gradients(tokens: int, vocabulary: int, tile: int) -> None:
    plain, tiled, targets = case(tokens, vocabulary, tile)
    exact = plain.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (grad,) = torch.autograd.grad(wanted.sum(), exact)
    before = tiled.clone()
    losses = HEAD_LOSSES(tiled, targets, tile, False)
    assert torch.equal(tiled, before) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=3e-6, atol=3e-6)
    assert torch.equal(HEAD_LOSSES(tiled, targets, tile, True), losses)
    for part, block in blocks(tiled, tile):
        torch.testing.assert_close(block.double(), grad[:, part], rtol=2**-8, atol=1e-7)


def test_threads_change_no_bit() -> None:
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            _, tiled, targets = case(11, 900, 256)
            found.append((HEAD_LOSSES(tiled, targets, 256, True), tiled))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_huge_logits_stay_finite_and_what_is_no_number_is_reported() -> None:
    _, tiled, targets = case(3, 100, 32, scale=1e4)
    assert torch.isfinite(HEAD_LOSSES(tiled, targets, 32, True)).all() and torch.isfinite(tiled).all()
    for wrong in (float("nan"), float("inf")):
        _, tiled, targets = case(3, 100, 32)
        blocks(tiled, 32)[1][1][1, 5] = wrong
        losses = HEAD_LOSSES(tiled, targets, 32, True)
        assert losses.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("targets", [[0, 8], [-1, 0], [0]])
def test_targets_that_are_no_words_are_refused(targets: list[int]) -> None:
    with pytest.raises(ValueError, match="targets in 0 … 7 and a tile above 0; given"):
        HEAD_LOSSES(torch.zeros(2, 8).bfloat16(), torch.tensor(targets), 4, False)


def test_shapes_alone_hold_what_numbers_hold() -> None:
    ledger = Ledger(vocabulary=96)
    with ledger, ledger.phase("loss"):
        logits, targets = torch.empty(4, 96, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
        assert HEAD_LOSSES(logits, targets, 32, True).shape == (4,)
    assert ledger.peaks["loss"].bytes == logits.nbytes + targets.nbytes + 4 * 4

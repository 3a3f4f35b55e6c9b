"""The loss under a head that is read once: that of train/text/loss but for rounding, and no farther from the truth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakeet.kernels.device import standing_for
from lorakeet.memory.ledger import Ledger
from lorakeet.memory.shape_only import ShapeStore
from lorakeet.memory.store import WeightStore, new_store
from lorakeet.memory.stream import RecordStream, StreamedRows
from lorakeet.models.text import tiled_loss
from lorakeet.models.text.tiled_loss import is_read_in_tiles, tiled_losses
from lorakeet.train.text.loss import frozen_head_losses

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
WORDS, HIDDEN, COUNT = 101, 16, 23


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_loss, "TILE", 16)


def given(dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """States, a head and targets: in the first and last tile, at their edges, and twice the same."""
    draw = torch.Generator().manual_seed(3)
    states, weight = (torch.randn(rows, HIDDEN, generator=draw) for rows in (COUNT, WORDS))
    targets = torch.randint(WORDS, (COUNT,), generator=draw)
    targets[:7] = torch.tensor([0, 15, 16, 31, WORDS - 1, 96, 96])
    return (states * size).to(dtype), weight.to(dtype), targets


def stored(folder: Path, weight: Tensor) -> StreamedRows:
    with new_store(folder / "s", identity={}, tensors=2) as writer:
        writer.add("block", {"w": torch.zeros(3)})
        writer.add("head", {"weight": weight})
    return StreamedRows("head.weight", CPU, RecordStream(WeightStore(folder / "s"), ["block"]))


def plain(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradients by autograd, in fp64."""
    exact = states.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact @ weight.double().t(), targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), exact)[0]


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_loss_and_gradient_are_the_formulas(chunk: int, tmp_path: Path) -> None:
    states, weight, targets = given(torch.float64)
    losses, grad = tiled_losses(states, stored(tmp_path, weight), targets, chunk=chunk)
    wanted = plain(states, weight, targets)
    assert grad is not None
    torch.testing.assert_close(losses, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, wanted[1], rtol=1e-10, atol=1e-12)
    alone, none = tiled_losses(states, stored(tmp_path / "other", weight), targets, chunk=chunk, wants_grad=False)
    assert none is None and torch.equal(alone, losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.1, 1.0, 8.0])
def test_it_is_no_farther_from_the_truth_than_a_head_in_memory(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    """Also where the target is all but certain, and p − 1 would lose its digits."""
    states, weight, targets = given(dtype, size)
    states[:5] = weight[targets[:5]] * 2
    truth, gradient = plain(states, weight, targets)
    leaf = states.clone().requires_grad_()
    usual = frozen_head_losses(leaf, weight, targets, chunk=8)
    (theirs,) = torch.autograd.grad(usual.sum(), leaf)
    losses, grad = tiled_losses(states, stored(tmp_path, weight), targets, chunk=8)
    assert losses.dtype == usual.dtype == torch.float32 and grad is not None and grad.dtype == dtype
    step = torch.finfo(dtype).eps
    assert (losses - truth).abs().max() <= (usual - truth).abs().max() + 4e-7 * truth.abs().max()
    for mine, other, right in zip(grad, theirs, gradient, strict=True):
        assert (mine - right).norm() <= 1.5 * (other - right).norm() + step * right.norm() + 1e-9


def test_the_head_is_read_once_however_many_targets_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, targets = given(torch.float32)
    rows, read = stored(tmp_path, weight), list[int]()
    own = WeightStore.read
    monkeypatch.setattr(WeightStore, "read", lambda store, begin, into: read.append(into.nbytes) or own(store, begin, into))
    tiled_losses(states, rows, targets, chunk=1)
    assert sum(read) == weight.nbytes and len(read) == -(-WORDS // 16)
    read.clear()
    found, _ = tiled_losses(states[:0], rows, targets[:0], chunk=1)
    assert read == [] and found.shape == (0,)


def test_no_more_logits_exist_than_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, targets = given(torch.float32)
    seen: list[tuple[int, ...]] = []
    own = tiled_loss.frozen_product

    def product(x: Tensor, rows: Tensor, *, across: bool = False) -> Tensor:
        seen.append((len(x), x.shape[1] if across else len(rows)))
        return own(x, rows, across=across)

    monkeypatch.setattr(tiled_loss, "frozen_product", product)
    tiled_losses(states, stored(tmp_path, weight), targets, chunk=2)
    assert seen and max(rows * columns for rows, columns in seen) <= 2 * WORDS


@pytest.fixture
def elsewhere() -> Iterator[None]:
    with standing_for(CARD):
        yield


@pytest.mark.usefixtures("elsewhere")
def test_the_loss_takes_it_for_a_head_that_comes_to_a_gpu(tmp_path: Path) -> None:
    states, weight, targets = given(torch.float32)
    rows, leaf = stored(tmp_path, weight), states.clone().requires_grad_()
    assert is_read_in_tiles(rows, CPU) and not is_read_in_tiles(weight, CPU) and not is_read_in_tiles(None, CPU)
    losses = frozen_head_losses(leaf, rows, targets, chunk=8)
    (losses * torch.arange(COUNT)).sum().backward()  # type: ignore[no-untyped-call]
    wanted = tiled_losses(states, rows, targets, chunk=8)
    assert torch.equal(losses, wanted[0]) and wanted[1] is not None and leaf.grad is not None
    torch.testing.assert_close(leaf.grad, wanted[1] * torch.arange(COUNT).unsqueeze(1))


@pytest.mark.slow
def test_on_shapes_it_takes_two_tiles_and_no_logits_of_all_words() -> None:
    words, hidden, count = 4096, 64, 512
    with Ledger() as ledger:
        store = ShapeStore({"block": {"w": torch.zeros(3)}, "head": {"weight": torch.zeros(words, hidden)}}, {})
        rows = StreamedRows("head.weight", CPU, RecordStream(store, ["block"]))
        states, targets = torch.zeros(count, hidden), torch.zeros(count, dtype=torch.int64)
        before = ledger.bytes
        with ledger.phase("loss"):
            tiled_losses(states, rows, targets, chunk=2)
    peak = ledger.peaks["loss"].bytes - before
    assert 2 * 16 * hidden * 4 <= peak < 6 * count * hidden * 4 < count * words * 4

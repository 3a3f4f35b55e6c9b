"""Gradients block by block: those of a resident model to the last bit, for any grouping and wherever inputs are kept."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.memory.spill import HostSpill, Spill
from lorakeet.memory.transfer import CudaTransfer
from lorakeet.models.inject import trained_parameters
from lorakeet.models.modules import draws_numbers
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.train import rng
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.streamed_gradients import _Random, gradients_by_block
from lorakeet.train.text.task import TextTask
from tiny.cards import Prompt, pinned
from tiny.models import save_tiny_llama
from tiny.streams import loaded, rows

CARD = torch.device("cuda", 0)
LORA = LoraSpec(rank=4, alpha=12.0, dropout=0.1)


def task_on(folder: Path, store: Path | None, **streaming: Any) -> TextTask:
    text = loaded(folder, store)
    initialise_adapter(text, plan_for(text.model, LORA, text.family), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(trained_parameters(text.model).values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return TextTask(text, rows(9), held_out=(), spec=TrainSpec(batch_size=9, micro_tokens=25), **streaming)


def gradients(task: TextTask) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    batches = task.batches(0)
    assert len(batches) >= 4
    total = task.gradients(batches, sum(batch.targets for batch in batches)).item()
    found = {name: parameter.grad for name, parameter in task.parameters().items() if parameter.grad is not None}
    assert len(found) == len(task.parameters())
    return total, found


@pytest.mark.parametrize("together", [0, 1, 3])
@pytest.mark.parametrize("on_disk", [False, True])
def test_any_grouping_gives_the_same_bits(together: int, on_disk: bool, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    scratch = tmp_path if on_disk else None
    resident = gradients(task_on(folder, None))
    streamed = gradients(task_on(folder, tmp_path / "store", together=together, spill=Spill(scratch)))
    assert resident[0] == streamed[0]
    assert all(torch.equal(resident[1][name], streamed[1][name]) for name in resident[1])


@pytest.mark.slow
def test_a_block_is_read_twice_a_step_however_many_batches_there_are(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=6)
    task = task_on(folder, tmp_path / "store")
    streamed = task.text.streamed
    assert streamed is not None
    gradients(task)
    before, blocks = streamed.stream.bytes_read, sum(record.bytes for record in streamed.stream.records)
    gradients(task)
    assert blocks < streamed.stream.bytes_read - before < 2 * blocks
    alone = task_on(folder, tmp_path / "store", together=1)
    gradients(alone)
    assert alone.text.streamed is not None and alone.text.streamed.stream.bytes_read > 6 * blocks


def test_random_numbers_of_the_step_leave_the_generator_where_the_resident_step_does(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    states = []
    for store in (None, tmp_path / "store"):
        gradients(task_on(folder, store))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_random_states_are_kept_for_models_that_draw_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is 5 KB of the CPU and a call of the device for each block, micro-batch and pass."""
    seen: list[int] = []
    own = rng.seeded
    monkeypatch.setattr(rng, "seeded", lambda seed, device: seen.append(seed) or own(seed, device))
    folder = save_tiny_llama(tmp_path / "model")
    task = task_on(folder, tmp_path / "store")
    gradients(task)
    assert len(seen) >= 4 and draws_numbers(task.text.model)
    seen.clear()
    monkeypatch.setattr(sys.modules[__name__], "LORA", replace(LORA, dropout=0.0))
    task = task_on(folder, tmp_path / "other")
    gradients(task)
    assert not seen and not draws_numbers(task.text.model)


def test_nothing_stays_spilled(tmp_path: Path) -> None:
    task = task_on(save_tiny_llama(tmp_path / "model"), tmp_path / "store")
    spill, batches = Spill(), task.batches(0)
    assert task.text.streamed is not None
    gradients_by_block(task.text, task.text.streamed, batches, sum(b.targets for b in batches), spill=spill, chunk=256)
    assert spill._tensors == {}


def test_a_micro_batch_draws_its_numbers_on_the_device_too_and_once_more_backwards(second_generator: torch.Generator) -> None:
    random, before = _Random(5, CARD), second_generator.get_state()
    drawn = []
    for block in range(3):
        with random.drawing(keep_for=block):
            drawn.append((torch.rand(2), torch.rand(2, generator=second_generator)))
    assert not torch.equal(drawn[0][1], drawn[1][1])
    for block in reversed(range(3)):
        with random.again(block):
            again = torch.rand(2), torch.rand(2, generator=second_generator)
        assert all(torch.equal(*pair) for pair in zip(drawn[block], again, strict=True))
    assert torch.equal(second_generator.get_state(), before), "what others draw is not touched"


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_blocks_that_are_copied_late_and_inputs_kept_by_the_host_give_the_same_bits(keep: bool, tmp_path: Path) -> None:
    """The way of a CUDA device, with the device simulated (tiny/cards)."""
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=4)
    resident = gradients(task_on(folder, None))
    task = task_on(folder, tmp_path / "store", together=2)
    assert task.text.streamed is not None
    stream, device = task.text.streamed.stream, Prompt()
    stream.release()
    stream.transfer = CudaTransfer(stream.store, task.text.device, keep=keep, cuda=device, pinned=pinned)
    task.spill = HostSpill(stream.transfer)
    for _ in range(2):
        for parameter in task.parameters().values():
            parameter.grad = None
        streamed = gradients(task)
        assert streamed[0] == resident[0]
        assert all(torch.equal(resident[1][name], streamed[1][name]) for name in resident[1])
    copies = device.log.count(("copying", "do"))
    assert copies > 2 * 2 * 4 * len(task.batches(0)), "each input of a block goes and comes back"

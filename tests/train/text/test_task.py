"""Text in the loop, with a real (tiny) transformers model: the loss is the model's own, and resuming is exact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.errors import RunStopped
from lorakeet.formats.peft import peft
from lorakeet.models import inject
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.train.interrupt import Interrupt
from lorakeet.train.loop import train
from lorakeet.train.progress import Record, Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec, learning_rate_for
from lorakeet.train.text.task import TextTask

SPEC = TrainSpec(steps=6, batch_size=4, micro_tokens=40, learning_rate=5e-3, evaluate_every=3, checkpoint_every=2, patience=0)
LORA = LoraSpec(rank=4, alpha=12.0, dropout=0.1)


def rows(count: int, seed: int) -> list[Example]:
    """Rows of 8 to 19 tokens that count upwards, the second half supervised."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(8, 20, size=count)
    starts = generator.integers(4, 60, size=count)
    return [
        Example(
            np.arange(start, start + length, dtype=np.int64), np.arange(length) >= length // 2, f"{seed}-{number}", None, False
        )
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def load(folder: Path) -> TextModel:
    return load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"))


def task_for(folder: Path, spec: TrainSpec = SPEC, lora: LoraSpec = LORA, held_out: int = 6) -> TextTask:
    text = load(folder)
    inject.inject(text.model, plan_for(text.model, lora, text.family), seed=spec.seed)
    return TextTask(text, rows(14, 1), held_out=rows(held_out, 2), spec=spec)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_loss_is_the_models_own(tiny_llama_folder: Path) -> None:
    task = task_for(tiny_llama_folder, lora=dataclasses.replace(LORA, dropout=0.0))
    total, targets = 0.0, 0
    for batch in task.batches(0):
        total += task.loss(batch).item()
        targets += task.size(batch).targets
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    expected, count = 0.0, 0
    for number in task.order.indices(0):
        row = task.train[number]
        ids = torch.from_numpy(row.ids)
        labels = torch.where(torch.from_numpy(row.supervised), ids, -100)
        loss = plain(input_ids=ids[None], labels=labels[None]).loss.item()
        expected, count = expected + loss * int(row.supervised.sum()), count + int(row.supervised.sum())
    assert targets == count
    assert total == pytest.approx(expected, rel=1e-5)


def test_held_out_rows_come_in_their_order_and_without_dropout(tiny_llama_folder: Path) -> None:
    task = task_for(tiny_llama_folder)
    task.loss(task.batches(0)[0])  # leaves the model in training mode
    state = torch.get_rng_state()
    held_out = task.held_out()
    assert held_out is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert held_out.weights.tolist() == [float(row.supervised.sum()) for row in rows(6, 2)]
    again = task.held_out()
    assert again is not None
    assert np.array_equal(held_out.sums, again.sums)
    assert task_for(tiny_llama_folder, held_out=0).held_out() is None


def test_the_rate_follows_from_the_hidden_size(tiny_llama_folder: Path) -> None:
    assert task_for(tiny_llama_folder).learning_rate == learning_rate_for(32, 0.781)


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        dataclasses.replace(LORA, start="pissa"),
        dataclasses.replace(LORA, variant="dora", dropout=0.0),
        dataclasses.replace(LORA, target_modules=("q_proj", "lm_head", "embed_tokens"), scale_rule="alpha/sqrt(rank)"),
        dataclasses.replace(LORA, target_modules=("v_proj",), extra_modules=("model.norm",)),
    ],
    ids=["lora", "pissa", "dora", "head-and-embedding", "norm"],
)
def test_it_learns_and_resumes_to_the_bit(tiny_llama_folder: Path, tmp_path: Path, lora: LoraSpec) -> None:
    whole = train(task_for(tiny_llama_folder, lora=lora), SPEC, run=RunFolder.create(tmp_path / "whole"))
    assert whole.best_loss is not None
    assert whole.base_loss is not None
    assert whole.best_loss < whole.base_loss

    stop = Interrupt()

    class Stopping(Reporter):
        def step(self, record: Record) -> None:
            if record["step"] == 3:
                stop.request("Ctrl-C")

    with pytest.raises(RunStopped):
        train(
            task_for(tiny_llama_folder, lora=lora),
            SPEC,
            run=RunFolder.create(tmp_path / "run"),
            report=Stopping(),
            interrupt=stop,
        )
    train(task_for(tiny_llama_folder, lora=lora), SPEC, run=RunFolder.open(tmp_path / "run"), resume=True)
    assert files(tmp_path / "run" / "adapter") == files(tmp_path / "whole" / "adapter")


def test_what_is_on_disk_is_what_the_model_holds(tiny_llama_folder: Path, tmp_path: Path) -> None:
    task = task_for(tiny_llama_folder)
    outcome = train(task, SPEC, run=RunFolder.create(tmp_path / "run"))
    fresh = load(tiny_llama_folder)
    inject.attach(fresh.model, peft.read(tmp_path / "run" / "adapter"))
    other: Any = TextTask(fresh, rows(14, 1), held_out=rows(6, 2), spec=SPEC).held_out()
    assert other.sums.sum() / other.weights.sum() == pytest.approx(outcome.best_loss, rel=1e-6)

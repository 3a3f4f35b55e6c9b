"""Writes a workload of packed rows over random weights in a model's true shape, with the model itself and the device's rate."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from harness.device_clock import rate as rate_of_gpu
from harness.made_up_model import write_model
from harness.workload import Row, Workload
from plan_accuracy import published_shape

from contenders import timed_step
from lorakeet.config import RunConfig, read_run
from lorakeet.data.batches import StepOrder
from lorakeet.data.chat import Example
from lorakeet.formats.peft import peft
from lorakeet.models.inject import adapter_of
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.train.text.task import TextTask

SPREAD = (0.5, 1.5, 0.75, 1.25)  # of a quarter of the pack: the rows that fill it to the last token
WORDS = 3, 4000  # the first and the last of the ids that are drawn
RANK, RATE = 16, 1e-4


@dataclass(frozen=True)
class Ready:
    """The model with a fresh adapter, and the task of training it on a workload's rows."""

    task: TextTask
    config: RunConfig


def lorakeet_on(workload: Workload, *, dtype: str = "bfloat16") -> Ready:
    """Lorakeet over the workload's model, as a run file with these settings loads it."""
    settings = {
        "data.train": "none", "data.max_tokens": workload.longest, "model.path": workload.model, "model.device": workload.device,
        "model.dtype": dtype, "model.quantize.method": workload.quantize,
        "lora.rank": workload.rank, "lora.alpha": workload.alpha, "train.seed": workload.seed,
        "train.batch_size": workload.batch_size, "train.micro_tokens": workload.micro_tokens, "train.schedule": "constant",
        "train.warmup_fraction": 0.0, "train.length_grouping": False, "train.learning_rate": workload.learning_rate,
        "train.steps": len(workload.steps), "train.evaluate_every": len(workload.steps) + 1,
        "train.checkpoint_every": len(workload.steps) + 1,
    }  # fmt: skip
    config = read_run(None, {key: str(value) for key, value in settings.items()})
    text = load_text_model(config.model)
    initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=config.train.seed)
    rows = sorted(workload.rows, key=lambda row: int(row.prompt))  # as numbered; `steps` are in the order of training
    return Ready(TextTask(text, [example_of(row) for row in rows], held_out=(), spec=config.train), config)


def example_of(row: Row) -> Example:
    supervised = np.zeros(len(row.ids), bool)
    supervised[list(row.targets)] = True
    return Example(np.array(row.ids, np.int64), supervised, row.prompt, None, False)


def drawn_steps(tokens: int, steps: int, seed: int, words: tuple[int, int] = WORDS) -> tuple[tuple[Row, ...], ...]:
    """A pack for each step; every token but the first of a row is a target. `prompt` is a row's number, by which Lorakeet's
    order of these rows has it in its step. Ids are drawn from `words`, the first of them and the one after the last."""
    draw, order = np.random.default_rng(seed), StepOrder(steps * len(SPREAD), len(SPREAD), seed)
    lengths = [round(share * tokens / len(SPREAD)) for share in SPREAD]
    numbered = (zip(lengths, order.indices(step), strict=True) for step in range(steps))
    return tuple(tuple(_drawn(draw, length, number, words) for length, number in of_step) for of_step in numbered)


def _drawn(draw: np.random.Generator, length: int, number: int, words: tuple[int, int]) -> Row:
    return Row(tuple(draw.integers(*words, length).tolist()), tuple(range(1, length)), str(number), "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", required=True)
    given = parser.parse_args()
    folder, adapter = given.workload.parent / "model", given.workload.with_name("adapter")
    changes = {} if given.layers is None else {"num_hidden_layers": given.layers}
    write_model(published_shape(given.model, **changes), folder, given.device)
    steps = drawn_steps(given.tokens, given.steps, given.seed)
    drawn = Workload(
        model=str(folder), adapter=str(adapter), rank=RANK, alpha=2.0 * RANK, target_modules=(), learning_rate=RATE,
        clip_norm=1.0, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, seed=given.seed, micro_tokens=given.tokens,
        shuffled=True, instructed=False, training_rows=None, held_out=(), save_after=(), steps=steps,
        device=given.device, quantize=given.base,
    )  # fmt: skip
    ready = lorakeet_on(drawn)
    task, text = ready.task, ready.task.text
    peft.write(adapter_of(text.model, base=str(folder)), adapter)
    plan = plan_for(text.model, ready.config.lora, text.family)
    targets = sorted({entry.path.rpartition(".")[2] for entry in plan.entries})
    replace(drawn, target_modules=tuple(targets)).write(given.workload)
    if {*drawn.tokens, *(len(batches) for batches in map(task.batches, range(given.steps)))} != {given.tokens, 1}:
        raise SystemExit(f"Steps have {drawn.tokens} tokens, and are to be packs of {given.tokens} that are computed at once.")
    gpu = given.device == "cuda"
    about = {
        "card": torch.cuda.get_device_name() if gpu else None,
        "rate": rate_of_gpu(torch.device("cuda")) if gpu else timed_step.rate(text.products),
    }
    given.workload.with_name("about.json").write_text(json.dumps(about), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes the quickstart's own first steps as a workload: the rows, ids and targets that `lorakeet finetune` would train on."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from harness.workload import Row, Workload
from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.data.chat import Example
from lorakeet.formats import peft
from lorakeet.models.inject import adapter_of
from lorakeet.train.text_task import TextTask
from lorakeet.workflows.assemble import Assembly, assemble, ready_to_train
from lorakeet.workflows.quickstart import config_path


def quickstart(
    *, steps: int, seed: int, dtype: str = "auto", out: str = "unused", shuffled: bool = False
) -> RunConfig:
    """The shipped run file, with a constant learning rate: libraries differ in what a warm-up's first step is.

    With `dtype` other than auto, weights and matrix products are both of that dtype; `shuffled`, rows of any length share a step.
    """
    config = read_run(config_path(), {"model.device": "cpu", "model.dtype": dtype, "model.products": dtype, "out": out})
    train = replace(
        config.train,
        steps=steps,
        seed=seed,
        schedule="constant",
        length_grouping=not shuffled,
        warmup_fraction=0.0,
        evaluate_every=steps + 1,
        checkpoint_every=steps + 1,
    )
    return replace(config, train=train)


def workload_of(setup: Assembly, task: TextTask, *, steps: int, adapter: Path) -> Workload:
    """The first `steps` steps of `task` with its settings; the adapter as it begins goes to `adapter`."""
    lora, train = setup.config.lora, setup.config.train
    peft.write(adapter_of(setup.text.model, base=str(setup.text.source)), adapter)
    return Workload(
        model=str(setup.text.source),
        adapter=str(adapter),
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=tuple(sorted({entry.path.rpartition(".")[2] for entry in setup.plan.entries})),
        learning_rate=train.learning_rate if train.learning_rate is not None else task.learning_rate,
        clip_norm=train.clip_norm,
        betas=(train.beta1, train.beta2),
        epsilon=train.epsilon,
        weight_decay=train.weight_decay,
        seed=train.seed,
        shuffled=not train.length_grouping,
        micro_tokens=train.micro_tokens,
        steps=tuple(
            tuple(_row(setup, setup.train.examples[number]) for number in task.order.indices(step)) for step in range(steps)
        ),
    )


def _row(setup: Assembly, example: Example) -> Row:
    tokenizer = setup.text.tokenizer
    ids, targets = example.ids.tolist(), example.supervised.nonzero()[0].tolist()
    first = targets[0]
    texts = [str(tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in (ids[:first], ids[first:])]
    return Row(tuple(ids), tuple(targets), texts[0], texts[1].removesuffix(tokenizer.eos_token))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--shuffled", action="store_true")
    given = parser.parse_args()
    setup = assemble(quickstart(steps=given.steps, seed=given.seed, shuffled=given.shuffled), Console(stderr=True))
    task = ready_to_train(setup, held_out=())
    workload = workload_of(setup, task, steps=given.steps, adapter=given.workload.with_name("adapter"))
    workload.write(given.workload)


if __name__ == "__main__":
    main()

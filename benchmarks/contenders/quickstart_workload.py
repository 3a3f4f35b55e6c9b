"""Writes the quickstart's own first steps as a workload: the rows, ids and targets that `lorakeet finetune` would train on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness.workload import Row, Workload
from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.data.chat import Example
from lorakeet.formats.peft import peft
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text, text_task
from lorakeet.models.inject import adapter_of
from lorakeet.train.text.task import TextTask
from lorakeet.verbs.quickstart import config_path

INSTRUCTION = (
    "You read what patients wrote about a drug that they took, and say what they think of it, in one word. Say positive "
    "where the drug helped and the writer would take it again, although there may have been some side effects. Say "
    "negative where it did not help, or where its side effects were worse than what it was taken for. Say neutral where "
    "good and bad weigh about the same, or where the writer has not made up his mind. Judge the drug alone, and not the "
    "doctor, the pharmacy or the price. Do not explain."
)
INSTRUCTED_TOKENS = 384  # the longest row with it: the reviews keep their length


def quickstart(
    *, steps: int, seed: int, dtype: str = "auto", out: str = "unused", shuffled: bool = False, instructed: bool = False,
    flags: Mapping[str, str] | None = None,
) -> RunConfig:  # fmt: skip
    """The shipped run file, with a constant learning rate: libraries differ in what a warm-up's first step is.

    With `dtype` other than auto, weights and matrix products are both of that dtype; `shuffled`, rows of any length share a
    step; `instructed`, every row begins with INSTRUCTION. `flags` are more settings.
    """
    system = {"data.system": INSTRUCTION, "data.max_tokens": str(INSTRUCTED_TOKENS)} if instructed else {}
    given = {"model.device": "cpu", "model.dtype": dtype, "model.products": dtype, "out": out, **system, **(flags or {})}
    config = read_run(config_path(), given)
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


def first_rows(setup: TextAssembly, count: int | None) -> TextAssembly:
    """The same with that many training rows; SystemExit where there are fewer."""
    if count is None:
        return setup
    if count > len(setup.train.examples):
        raise SystemExit(f"{count} training rows were requested, and there are {len(setup.train.examples)}.")
    return replace(setup, train=replace(setup.train, examples=setup.train.examples[:count]))


@dataclass(frozen=True)
class Asked:
    """What the workload is to be beside the quickstart's settings; see Workload."""

    steps: int
    save_every: int | None
    training_rows: int | None
    judged_rows: int
    instructed: bool


def workload_of(setup: TextAssembly, task: TextTask, asked: Asked, *, adapter: Path) -> Workload:
    """The first steps of `task` with its settings; the adapter as it begins goes to `adapter`."""
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
        instructed=asked.instructed,
        training_rows=asked.training_rows,
        held_out=tuple(_row(setup, example) for example in setup.held_out.examples[: asked.judged_rows]),
        save_after=_save_after(asked),
        steps=tuple(
            tuple(_row(setup, setup.train.examples[number]) for number in task.order.indices(step)) for step in range(asked.steps)
        ),
    )


def _save_after(asked: Asked) -> tuple[int, ...]:
    """Every so many steps, and the last one."""
    if asked.save_every is None:
        return ()
    return (*range(asked.save_every, asked.steps, asked.save_every), asked.steps)


def _row(setup: TextAssembly, example: Example) -> Row:
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
    parser.add_argument("--instructed", action="store_true")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--training-rows", type=int)
    parser.add_argument("--save-every", type=int)
    parser.add_argument("--judged-rows", type=int, default=0)
    given = parser.parse_args()
    flags = {} if given.batch_size is None else {"train.batch_size": str(given.batch_size)}
    config = quickstart(
        steps=given.steps, seed=given.seed, shuffled=given.shuffled, instructed=given.instructed, flags=flags
    )
    setup = first_rows(assemble_text(config, Console(stderr=True)), given.training_rows)
    task = text_task(setup, held_out=())
    asked = Asked(given.steps, given.save_every, given.training_rows, given.judged_rows, given.instructed)
    workload_of(setup, task, asked, adapter=given.workload.with_name("adapter")).write(given.workload)


if __name__ == "__main__":
    main()

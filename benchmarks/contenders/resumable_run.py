"""A short training of the quickstart that can be killed and resumed; says how long checkpoints take."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from contenders.quickstart_workload import quickstart
from lorakeet.kinds.text.assemble import assemble_text, text_task
from lorakeet.memory.measure import PeakMemory
from lorakeet.train.interrupt import Interrupt
from lorakeet.train.loop import Training
from lorakeet.train.progress import Reporter
from lorakeet.train.run import RunFolder

HELD_OUT = 8  # rows: enough that a best adapter is kept, so that the checkpoint is as large as in a real run
ROWS_A_STEP = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--spawned", type=float, required=True, help="time.time() when this process was started")
    parser.add_argument("--saves", type=int, default=0, help="how often to write the last checkpoint again, timed")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    found: dict[str, object] = {}
    training = _training(given)
    with PeakMemory() as memory, Interrupt() as stop:
        training.memory = memory
        began = time.perf_counter()
        training.open({}, resume=given.resume)
        found["open_seconds"] = time.perf_counter() - began
        found["begun_at_step"] = training.at.step
        if training.at.step:
            training.step()
            found["seconds_from_start_to_first_new_step"] = time.time() - given.spawned
            training.evaluate()
            training.save()
        training.go(stop)
        found["save_seconds"] = [_seconds_of_a_save(training) for _ in range(given.saves)]
        training.finish()
        training.close()
    given.result.write_text(json.dumps(found), encoding="utf-8")


def _training(given: argparse.Namespace) -> Training:  # type: ignore[type-arg]
    config = quickstart(steps=given.steps, seed=given.seed)
    spec = replace(config.train, batch_size=ROWS_A_STEP, evaluate_every=1, checkpoint_every=1)
    setup = assemble_text(replace(config, train=spec), Console(stderr=True))
    task = text_task(setup, held_out=setup.held_out.examples[:HELD_OUT])
    run = RunFolder.open(given.run) if given.resume else RunFolder.create(given.run)
    return Training(task, spec, run=run, report=Reporter())


def _seconds_of_a_save(training: Training) -> float:  # type: ignore[type-arg]
    began = time.perf_counter()
    training.save()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

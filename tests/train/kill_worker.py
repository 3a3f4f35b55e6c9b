"""Trains the tiny task in processes of their own, so that tests can kill them.

python kill_worker.py    forks a process for each JSON line {"run": …, "file_limit": bytes or null, "clock": …}
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lorakeet.errors import LorakeetError
from lorakeet.train.loop import train
from lorakeet.train.progress import Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from tiny.forked import serve
from train.tiny_task import TinyTask

SPEC = TrainSpec(
    steps=40, batch_size=8, micro_tokens=48, learning_rate=0.02, evaluate_every=2, checkpoint_every=1, patience=0, seed=3
)


class Loud(Reporter):
    def say(self, text: str) -> None:
        print(text, file=sys.stderr)


def work(path: Path, *, jumping: bool = False) -> int:
    """Begins or goes on with the run in `path`; the exit code. `jumping`: the wall clock is days off at each look at it."""
    if jumping:
        now, chance = time.time, random.Random(4)
        time.time = lambda: now() + chance.uniform(-9e5, 9e5)
    resume = (path / "checkpoints").exists()  # killed before, there is nothing to go on with
    run = RunFolder.open(path) if resume else RunFolder.create(path)
    try:
        train(TinyTask(SPEC), SPEC, run=run, resume=resume, report=Loud())
    except LorakeetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # brings in what torch loads late, once for all processes
    serve(lambda order: work(Path(order["run"]), jumping="clock" in order))

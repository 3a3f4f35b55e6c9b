"""Lorakeet with Fast Forward (arXiv 2409.04206): now and then the last step is repeated as long as held-out loss falls.

Not a feature of Lorakeet: finetune_vs_peft --to-loss measures it, seed by seed. Its work is within the clock.
"""

from __future__ import annotations

import torch
from harness.steps import StepLog, contender
from harness.workload import Workload

from contenders.with_lorakeet import Recorder, train_lorakeet
from lorakeet.models.generate.score import row_losses
from lorakeet.train.progress import Record

EVERY = 6  # steps between two repetitions, as the paper has it
ROWS = 32  # held-out rows that say when to end, as the paper has it
FIRST = 6  # before that, Adam's moments are hardly known


class Forwarding(Recorder):
    """Repeats the step W_t − W_{t−1} while the loss on rows that are neither trained on nor evaluated falls."""

    repeated = 0

    def step(self, record: Record) -> None:
        done = len(self.log.seconds) + 1
        if done >= FIRST and done % EVERY == 0:
            self._forward()
        super().step(record)
        if (done + 1) % EVERY == 0:
            self._before = {name: value.detach().clone() for name, value in self.task.parameters().items()}

    def _forward(self) -> None:
        values = self.task.parameters()
        change = {name: value.detach() - self._before[name] for name, value in values.items()}
        loss = self._loss()
        with torch.no_grad():
            while True:
                for name, value in values.items():
                    value.add_(change[name])
                found = self._loss()
                if not found < loss:
                    break
                loss, self.repeated = found, self.repeated + 1
            for name, value in values.items():
                value.sub_(change[name])
        self.setup.text.train()
        self.log.notes["steps taken again"] = self.repeated

    def _loss(self) -> float:
        spec = self.setup.config.train
        losses, tokens = row_losses(self.setup.text, self.beside, micro_tokens=spec.micro_tokens, chunk=spec.head_chunk)
        return float(losses.sum() / tokens.sum())


def train_forward(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps, and some of them again."""
    return train_lorakeet(workload, dtype, recorder=Forwarding, rows_beside=ROWS)


if __name__ == "__main__":
    contender(train_forward)

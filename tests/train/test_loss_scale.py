"""The loss scale: exact where nothing overflows, halved where something does, and part of what a resumed run goes on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakeet.data.pack import Batch
from lorakeet.errors import RunStopped
from lorakeet.train import loss_scale
from lorakeet.train.checkpoint import load_checkpoint
from lorakeet.train.log import read_metrics
from lorakeet.train.loss_scale import START, LossScale
from lorakeet.train.task import HeldOut
from train.test_loop import SPEC, StopAt, adapter_bytes, evaluations_of, go, steps_of, stopped, timeless
from train.tiny_task import TinyTask


class Narrow(TinyTask):
    """Has the loss scaled as in float16, and computes in fp32, so that nothing overflows by itself: `bad` steps are made to."""

    dtype = torch.float16
    bad: tuple[int, ...] = ()
    seen = 0

    def batches(self, step: int) -> Any:
        self.seen = step + 1
        return super().batches(step)

    def loss(self, batch: Batch) -> Tensor:
        loss = super().loss(batch)
        if self.seen not in self.bad:
            return loss
        b = self.parameters()["second.B"]
        return loss + torch.sqrt((b - b.detach()).square()).sum()  # 0, with the slope 0/0


def narrow(*bad: int) -> Narrow:
    task = Narrow(SPEC)
    task.bad = bad
    return task


def test_a_scale_changes_no_bit_of_a_run_that_does_not_overflow(tmp_path: Path) -> None:
    outcome, _ = go(tmp_path / "scaled", task=narrow())
    plain, _ = go(tmp_path / "plain")
    assert (outcome.loss_scale, outcome.skipped_steps) == (START, 0) and plain.loss_scale is None
    assert adapter_bytes(tmp_path / "scaled") == adapter_bytes(tmp_path / "plain")
    ours = [{key: value for key, value in record.items() if "scale" not in key and "skipped" not in key}
            for record in timeless(tmp_path / "scaled")]  # fmt: skip
    assert ours == timeless(tmp_path / "plain")


def test_steps_that_overflow_are_left_out_counted_and_said(tmp_path: Path) -> None:
    """The first two as well, after which the third is the one in which A has no gradient yet."""
    report, before = StopAt(99), {}

    class Watching(Narrow):
        def batches(self, step: int) -> Any:
            before[step + 1] = {name: p.detach().clone() for name, p in self.parameters().items()}
            return super().batches(step)

    task = Watching(SPEC)
    task.bad = (1, 2, 8)
    outcome, _ = go(tmp_path / "run", task=task, report=report)
    assert (outcome.steps, outcome.skipped_steps, outcome.loss_scale) == (12, 3, START / 8)
    for step in range(1, 12):
        same = [torch.equal(before[step][name], before[step + 1][name]) for name in before[step]]
        assert all(same) if step in task.bad else not all(same[1::2])
    assert report.said[0].startswith("Step 1: the loss is ") and len(report.said) == 3
    assert report.said[2].endswith("It is skipped, and the loss scale is now 8,192.")
    records = steps_of(tmp_path / "run")
    assert [record["skipped_steps"] for record in records] == [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert records[7]["grad_norm"] is None and records[7]["loss_scale"] == START / 8
    losses = [record["held_out_loss"] for record in evaluations_of(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]


def test_it_grows_after_so_many_good_steps_and_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH", 3)
    go(tmp_path / "whole", task=narrow(5, 6))
    for step, done in ((5, False), (8, True)):
        stopped(tmp_path / "run", step, task=narrow(5, 6), resume=done)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000008").position.scale == LossScale(START / 2, True, 2, 2)
    go(tmp_path / "run", task=narrow(5, 6), resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    scales = [record["loss_scale"] / START for record in steps_of(tmp_path / "run")]
    assert scales == [1, 1, 2, 2, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2]


def test_where_every_step_overflows_the_run_ends_with_the_remedy(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, steps=40)
    task = Narrow(spec)
    task.bad = tuple(range(4, 41))
    with pytest.raises(RunStopped) as error:
        go(tmp_path / "run", spec, task)
    said = str(error.value)
    assert said.startswith("Step 20: the loss is ") and "17 steps overflowed model.dtype float16" in said
    assert said.endswith("Start a new run with model.dtype bfloat16, or float32 without bfloat16 support.")
    assert "step-000018" in said and read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["loss_scale"] == 1


def test_only_float16_is_scaled() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale.of(dtype)
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.full((2,), 3.0)
        scale.unscale({"A": parameter})
        scale.record_step()
        assert scale.value == 1 and not scale.dynamic and scale.record() == {} and bool((parameter.grad == 3).all())


def test_a_base_that_float16_cannot_compute_names_the_dtype(tmp_path: Path) -> None:
    class Beyond(Narrow):
        def held_out(self) -> HeldOut | None:
            return HeldOut(np.array([np.inf]), np.ones(1))

    with pytest.raises(RunStopped, match=r"Step 0: the held-out loss is not finite.* or with model\.dtype bfloat16 or float32"):
        go(tmp_path / "run", task=Beyond(SPEC))

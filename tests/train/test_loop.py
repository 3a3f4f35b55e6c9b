"""The loop on a real tiny task: what it computes and keeps, the best adapter, patience, and how it stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.data.pack import Batch, pack_examples
from lorakeet.errors import ConfigError, DataError, RunStopped, VerificationFailed
from lorakeet.evaluate.values import decode, encode
from lorakeet.formats.peft import peft
from lorakeet.train import checkpoint
from lorakeet.train.interrupt import Interrupt
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import Outcome, train
from lorakeet.train.progress import Record, Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.stopping import EarlyStopping
from lorakeet.train.task import HeldOut
from train.tiny_task import TinyTask

SPEC = TrainSpec(steps=12, batch_size=8, micro_tokens=48, learning_rate=0.02, evaluate_every=3, checkpoint_every=2, patience=0)
TIMES = {"tokens_per_second", "seconds", "memory_bytes"}


def go(path: Path, spec: TrainSpec = SPEC, task: TinyTask | None = None, **options: Any) -> tuple[Outcome, TinyTask]:
    task = task or TinyTask(spec)
    run = RunFolder.open(path) if options.get("resume") else RunFolder.create(path)
    return train(task, spec, run=run, **options), task


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(path / "metrics.jsonl") if "loss" in record]


def evaluations_of(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(path / "metrics.jsonl") if "held_out_loss" in record]


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(path / "metrics.jsonl")]


def adapter_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((path / "adapter").iterdir())}


class StopAt(Reporter):
    """Asks for a stop as if Ctrl-C had been pressed during a step."""

    def __init__(self, step: int) -> None:
        self.at, self.interrupt, self.said = step, Interrupt(), list[str]()

    def step(self, record: Record) -> None:
        if record["step"] == self.at:
            self.interrupt.request("Ctrl-C")

    def say(self, text: str) -> None:
        self.said.append(text)


def stopped(path: Path, step: int, spec: TrainSpec = SPEC, **options: Any) -> str:
    """Runs until Ctrl-C in `step`; the message."""
    report = StopAt(step)
    with pytest.raises(RunStopped) as error:
        go(path, spec, report=report, interrupt=report.interrupt, **options)
    return str(error.value)


def test_it_learns_and_keeps_the_best_adapter(tmp_path: Path) -> None:
    outcome, task = go(tmp_path / "run", dataclasses.replace(SPEC, steps=40))
    losses = {record["step"]: record["held_out_loss"] for record in evaluations_of(tmp_path / "run")}
    assert list(losses) == [0, *range(3, 40, 3), 40]
    assert outcome.base_loss == losses.pop(0)
    assert outcome.best_loss == min(losses.values()) < 0.8 * outcome.base_loss
    assert losses[outcome.best_step or 0] == outcome.best_loss
    assert (outcome.steps, outcome.reason) == (40, "all steps done")
    assert outcome.peak_bytes > 50e6
    written = peft.read(tmp_path / "run" / "adapter")
    for name, pair in task.adapter().pairs.items():
        assert torch.equal(written.pairs[name].A, pair.A)
        assert torch.equal(written.pairs[name].B, pair.B)
    measured = task.held_out()
    assert measured is not None
    assert measured.sums.sum() / measured.weights.sum() == pytest.approx(outcome.best_loss, rel=1e-6)


def test_records_say_what_happened(tmp_path: Path) -> None:
    outcome, task = go(tmp_path / "run")
    records = steps_of(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert set(records[0]) == {"step", "epoch", "loss", "tokens", "supervised", "lr", "grad_norm", *TIMES}
    sizes = [[task.size(batch) for batch in task.batches(step)] for step in range(12)]
    assert [record["tokens"] for record in records] == [sum(size.tokens for size in step) for step in sizes]
    assert [record["supervised"] for record in records] == [sum(size.targets for size in step) for step in sizes]
    assert outcome.tokens == sum(record["tokens"] for record in records)
    assert records[5]["epoch"] == 1
    assert records[0]["lr"] == pytest.approx(0.02)  # one step of warm-up
    assert records[-1]["lr"] == pytest.approx(0.02 / 11)
    for record in evaluations_of(tmp_path / "run"):
        assert set(record) == {"step", "held_out_loss", "low", "high", "n"}
        assert record["low"] < record["held_out_loss"] < record["high"]
        assert record["n"] == 12


def test_many_micro_batches_equal_one(tmp_path: Path) -> None:
    adapters = []
    for name, tokens in (("one", 10**6), ("many", 1), ("some", 40)):
        spec = dataclasses.replace(SPEC, micro_tokens=tokens)
        _, task = go(tmp_path / name, spec, TinyTask(spec, dropout=0.0))
        adapters.append(task.adapter())
    counts = [len(TinyTask(dataclasses.replace(SPEC, micro_tokens=tokens)).batches(0)) for tokens in (10**6, 1, 40)]
    assert counts[0] == 1 < counts[2] < counts[1] == 8
    for other in adapters[1:]:
        for name, pair in adapters[0].pairs.items():
            torch.testing.assert_close(other.pairs[name].A, pair.A, rtol=2e-3, atol=2e-4)
            torch.testing.assert_close(other.pairs[name].B, pair.B, rtol=2e-3, atol=2e-4)


def test_the_gradient_is_that_of_the_mean_over_all_targets(tmp_path: Path) -> None:
    """Against the literal definition: one batch, one mean over its supervised tokens, torch's own cross-entropy."""
    spec = dataclasses.replace(SPEC, batch_size=SPEC.batch_size - 1, steps=1)
    task = TinyTask(spec, dropout=0.0)
    batch = pack_examples([task.rows[row] for row in task.order.indices(0)])
    logits = task.text.head(task.text.hidden(batch))
    loss = torch.nn.functional.cross_entropy(logits, batch.target_ids)
    grads = torch.autograd.grad(loss, list(task.parameters().values()))
    norm = sum(float(grad.pow(2).sum()) for grad in grads) ** 0.5
    counts = [task.size(part).targets for part in task.batches(0)]
    assert len(set(counts)) > 1  # unequal micro-batches, or a mean of means would pass too
    go(tmp_path / "run", spec, task)
    record = steps_of(tmp_path / "run")[0]
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_last_partial_step_is_stepped(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, steps=None, epochs=1.0, batch_size=4, schedule="constant", warmup_fraction=0.0)
    task = TinyTask(spec, rows=10, held_out=0, dropout=0.0)
    before: list[Tensor] = []

    class Watching(Reporter):
        def step(self, record: Record) -> None:
            before.append(task.parameters()["second.B"].detach().clone())

    go(tmp_path / "run", spec, task, report=Watching())
    records = steps_of(tmp_path / "run")
    assert len(records) == 3
    assert sum(len(batch.lengths) for batch in task.batches(2)) == 2
    assert sum(record["supervised"] for record in records) == sum(row.supervised.sum() for row in task.rows)
    assert not torch.equal(before[1], before[2])


def test_ctrl_c_in_the_evaluation_of_the_base_stops_before_the_first_step(tmp_path: Path) -> None:
    stop = Interrupt()

    class Stopping(TinyTask):
        def held_out(self) -> HeldOut | None:
            stop.request("Ctrl-C")
            return super().held_out()

    with pytest.raises(RunStopped, match=r"^Ctrl-C: stopped before the first step. Start it again with: .*--resume"):
        go(tmp_path / "run", SPEC, Stopping(SPEC), interrupt=stop)
    assert steps_of(tmp_path / "run") == []
    go(tmp_path / "run", SPEC, resume=True)
    go(tmp_path / "whole", SPEC)
    assert evaluations_of(tmp_path / "run") == evaluations_of(tmp_path / "whole")


def test_clipping_limits_the_step(tmp_path: Path) -> None:
    first = [
        go(tmp_path / name, dataclasses.replace(SPEC, steps=1, clip_norm=limit, epsilon=1.0))[1].parameters()["first.B"]
        for name, limit in (("off", 0.0), ("tight", 1e-3))
    ]  # with a large epsilon, AdamW's step follows the gradient's size
    assert first[1].abs().max() < 0.05 * first[0].abs().max()


class Scripted(TinyTask):
    """Held-out losses as told, one after another."""

    losses: Iterator[float]

    def held_out(self) -> HeldOut | None:
        return HeldOut(np.array([next(self.losses)] * 3), np.ones(3))


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, steps=100, evaluate_every=1, patience=3)
    task = Scripted(spec)
    task.losses = iter([9.0, 5.0, 4.0, 4.5, 4.0, 4.2])
    kept: dict[int, dict[str, Tensor]] = {}

    class Watching(Reporter):
        def step(self, record: Record) -> None:
            kept[int(record["step"] or 0)] = {name: p.detach().clone() for name, p in task.parameters().items()}

    outcome, _ = go(tmp_path / "run", spec, task, report=Watching())
    assert (outcome.steps, outcome.best_step, outcome.best_loss, outcome.base_loss) == (5, 2, 4.0, 9.0)
    assert outcome.reason == "no improvement in 3 evaluations after step 2 (held-out loss 4.0000)"
    for name, parameter in task.parameters().items():
        assert torch.equal(parameter, kept[2][name])
        assert not torch.equal(parameter, kept[5][name])
    assert torch.equal(peft.read(tmp_path / "run" / "adapter").pairs["first"].B, kept[2]["first.B"])
    again, _ = go(tmp_path / "run", spec, Scripted(spec), resume=True)  # asks for no evaluation: it would have none to give
    assert dataclasses.replace(again, seconds=0, peak_bytes=0) == dataclasses.replace(outcome, seconds=0, peak_bytes=0)


class Poisoned(TinyTask):
    """A loss that is not a number in the second micro-batch of one step, or a gradient that is not."""

    bad_step = 8
    gradient = False
    seen = 0

    def batches(self, step: int) -> Any:
        self.seen = step + 1
        self.inside = 0
        self.before = {name: p.detach().clone() for name, p in self.parameters().items()}
        return super().batches(step)

    def loss(self, batch: Batch) -> Tensor:
        loss = super().loss(batch)
        self.inside += 1
        if self.seen != self.bad_step or self.inside != 2:
            return loss
        if self.gradient:
            b = self.parameters()["second.B"]
            return loss + torch.sqrt((b - b.detach()).square()).sum()  # 0, with the slope 0/0
        return loss * float("nan")


@pytest.mark.parametrize("gradient", [False, True])
def test_nan_stops_before_the_step_and_keeps_what_was_good(tmp_path: Path, gradient: bool) -> None:
    task = Poisoned(SPEC)
    task.gradient = gradient
    with pytest.raises(RunStopped) as error:
        go(tmp_path / "run", SPEC, task)
    said = str(error.value)
    assert said.startswith("Step 8: the loss is nan." if not gradient else "Step 8: the loss is ")
    assert ("the gradient is not finite (first in second.B)" in said) == gradient
    assert "The step was not taken." in said
    assert f"{tmp_path / 'run' / 'checkpoints' / 'step-000006'}" in said
    assert "step 6)" in said
    assert "lower train.learning_rate (now 0.02)" in said
    assert all(torch.equal(parameter, task.before[name]) for name, parameter in task.parameters().items())
    kept = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000006")
    assert all(torch.isfinite(tensor).all() for tensor in kept.trained.values())
    assert torch.isfinite(peft.read(tmp_path / "run" / "adapter").pairs["first"].B).all()
    assert steps_of(tmp_path / "run")[-1]["step"] == 7


def test_a_held_out_loss_far_above_the_base_stops_too(tmp_path: Path) -> None:
    task = Scripted(SPEC)
    task.losses = iter([9.0, 5.0, 19.5])
    with pytest.raises(RunStopped) as error:
        go(tmp_path / "run", SPEC, task)
    said = str(error.value)
    assert said.startswith("Step 6: training diverged, the held-out loss is 19.5 and was 9 before training. Kept:")
    assert "step-000004" in said and "(held-out loss 5.0000 at step 3)" in said
    assert "lower train.learning_rate" in said


@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto"])
def test_a_squared_loss_that_rises_by_more_than_ten_goes_on(tmp_path: Path, objective: Any) -> None:
    spec = dataclasses.replace(SPEC, objective=objective, steps=6)
    task = Scripted(spec)
    task.losses = iter([2500.0, 2400.0, 2600.0])
    assert go(tmp_path / "run", spec, task)[0].steps == 6
    task = Scripted(spec)
    task.losses = iter([2500.0, 2400.0, 5011.0])
    with pytest.raises(RunStopped, match="Step 6: training diverged, the held-out loss is 5011 and was 2500 before training"):
        go(tmp_path / "far", spec, task)


def test_a_divergence_in_the_first_step_is_no_missing_gradient(tmp_path: Path) -> None:
    """One absurd step leaves a model whose gradients vanish; the remedy is the learning rate, not lora.exclude_modules."""

    class Burst(TinyTask):
        def loss(self, batch: Batch) -> Tensor:
            loss = super().loss(batch)
            return loss if self.parameters()["first.B"].abs().max() == 0 else loss * 0 + 1e4

        def held_out(self) -> HeldOut | None:
            found = super().held_out()
            assert found is not None
            jumped = self.parameters()["first.B"].abs().max() > 0
            return HeldOut(found.sums * 100, found.weights) if jumped else found

    with pytest.raises(RunStopped, match=r"Step 3: training diverged"):
        go(tmp_path / "run", SPEC, Burst(SPEC))


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, start: str) -> None:
    """Twice interrupted, in a step with a checkpoint of its own and in one without; dropout draws random numbers all along."""
    go(tmp_path / "whole", SPEC, TinyTask(SPEC, start=start))
    said = stopped(tmp_path / "run", 3, task=TinyTask(SPEC, start=start))
    assert "stopped after step 3 of 12" in said
    assert f"lorakeet finetune --resume {tmp_path / 'run'}" in said
    stopped(tmp_path / "run", 8, task=TinyTask(SPEC, start=start), resume=True)
    torch.manual_seed(99)
    go(tmp_path / "run", SPEC, TinyTask(SPEC, start=start), resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_resume_puts_the_best_adapter_back_as_well(tmp_path: Path) -> None:
    """A later, better adapter was published and its checkpoint then lost: the run goes on from what the checkpoint knows."""
    go(tmp_path / "whole")
    stopped(tmp_path / "run", 7)
    best_then = adapter_bytes(tmp_path / "run")
    for file in (tmp_path / "run" / "adapter").iterdir():
        file.write_bytes(b"from a step that is not known any more")
    stopped(tmp_path / "run", 8, resume=True)
    assert adapter_bytes(tmp_path / "run") == best_then
    go(tmp_path / "run", resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_a_damaged_checkpoint_costs_two_steps_and_nothing_else(tmp_path: Path) -> None:
    go(tmp_path / "whole")
    stopped(tmp_path / "run", 6)
    damaged = tmp_path / "run" / "checkpoints" / "step-000006" / "moments.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    report = StopAt(99)
    go(tmp_path / "run", resume=True, report=report)
    assert [line for line in report.said if "step-000006 is damaged" in line] == report.said
    assert len(report.said) == 1
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_without_a_checkpoint_it_begins_again_and_says_so(tmp_path: Path) -> None:
    go(tmp_path / "whole")
    RunFolder.create(tmp_path / "run").metrics.write_text('{"step": 0}\n')
    report = StopAt(99)
    go(tmp_path / "run", resume=True, report=report)
    assert len(report.said) == 1
    assert "starts again at step 0" in report.said[0]
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_other_settings_cannot_go_on(tmp_path: Path) -> None:
    stopped(tmp_path / "run", 2, identity={"data": "a"})
    other = dataclasses.replace(SPEC, seed=4, keep_checkpoints=9)
    with pytest.raises(ConfigError) as error:
        go(tmp_path / "run", other, resume=True, identity={"data": "b"})
    assert "train.seed was 0" in str(error.value)
    assert "The data changed since" in str(error.value) and "(sha256 a… then, b… now)" in str(error.value)
    assert "keep_checkpoints" not in str(error.value)
    assert steps_of(tmp_path / "run")[-1]["step"] == 2


def test_another_environment_is_said_once(tmp_path: Path) -> None:
    stopped(tmp_path / "run", 2)
    path = tmp_path / "run" / "checkpoints" / "step-000002"
    snapshot = checkpoint.load_checkpoint(path)
    snapshot.identity["environment"]["torch"] = "1.0"  # type: ignore[index]
    checkpoint.save(path.parent, snapshot, keep=2)
    report = StopAt(99)
    go(tmp_path / "run", resume=True, report=report)
    assert len(report.said) == 1
    assert "torch 1.0 → " in report.said[0]


def test_without_held_out_rows_the_last_adapter_is_kept(tmp_path: Path) -> None:
    outcome, task = go(tmp_path / "run", SPEC, TinyTask(SPEC, held_out=0))
    assert (outcome.base_loss, outcome.best_loss, outcome.best_step) == (None, None, 12)
    assert torch.equal(peft.read(tmp_path / "run" / "adapter").pairs["first"].B, task.parameters()["first.B"])
    assert evaluations_of(tmp_path / "run") == []


def test_a_tensor_without_gradient_is_named(tmp_path: Path) -> None:
    class Unused(TinyTask):
        def parameters(self) -> dict[str, Parameter]:
            return {**super().parameters(), "vision.proj.A": self.lost[0], "vision.proj.B": self.lost[1]}

        lost = Parameter(torch.ones(4, 8)), Parameter(torch.zeros(8, 4))

    with pytest.raises(VerificationFailed, match=r"no gradient: vision\.proj\.A, vision\.proj\.B"):
        go(tmp_path / "run", SPEC, Unused(SPEC))


def test_rows_without_targets_are_refused(tmp_path: Path) -> None:
    task = TinyTask(SPEC)
    task.rows = [dataclasses.replace(row, supervised=np.zeros_like(row.supervised)) for row in task.rows]
    with pytest.raises(DataError, match="No token of the 8 rows of step 1 is supervised"):
        go(tmp_path / "run", SPEC, task)


def test_a_broken_memory_budget_is_said_once_and_a_kept_one_never(tmp_path: Path) -> None:
    for name, budget, times in (("broken", 1, 1), ("kept", 1 << 50, 0)):
        said: list[str] = []
        report = Reporter()
        report.say = said.append  # type: ignore[method-assign]
        train(TinyTask(SPEC), SPEC, run=RunFolder.create(tmp_path / name), report=report, budget=budget)
        assert len([line for line in said if "above the budget of 1" in line]) == times


@pytest.mark.parametrize("stop", [0, 5])
def test_under_a_budget_the_best_adapter_is_on_disk_and_a_run_leaves_the_same_bytes(stop: int, tmp_path: Path) -> None:
    go(tmp_path / "memory")
    if stop:  # and goes on from a checkpoint
        stopped(tmp_path / "disk", stop, budget=1 << 50)
    go(tmp_path / "disk", budget=1 << 50, resume=bool(stop))
    assert adapter_bytes(tmp_path / "disk") == adapter_bytes(tmp_path / "memory")
    for one in (tmp_path / "memory" / "checkpoints").glob("*/*.safetensors"):
        assert (tmp_path / "disk" / "checkpoints" / one.parent.name / one.name).read_bytes() == one.read_bytes()
    assert not RunFolder(tmp_path / "disk").best.exists()


def test_under_a_budget_on_a_cuda_device_its_memory_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.train.loop.cuda_device_of", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr("lorakeet.train.loop.gpu_peak_bytes", lambda _: 1234)
    said: list[str] = []
    report = Reporter()
    report.say = said.append  # type: ignore[method-assign]
    outcome = train(TinyTask(SPEC), SPEC, run=RunFolder.create(tmp_path / "run"), report=report, budget=1233)
    assert outcome.peak_bytes == 1234
    assert len([line for line in said if "peak memory is 1,234 bytes on cuda:0, above the budget of 1,233" in line]) == 1


def test_an_outcome_is_read_back_as_it_was_written() -> None:
    """That of an earlier version, which knew no loss scale, too."""
    ended = Outcome(8, 9, "no improvement", 0.3, 0.2, 6, 1e-4, 32, 1.5, 10**9, skipped_steps=2, loss_scale=2.0**14)
    written = encode(ended)
    assert decode(Outcome, written) == ended
    older = decode(Outcome, {key: value for key, value in written.items() if key not in ("skipped_steps", "loss_scale")})
    assert (older.steps, older.skipped_steps, older.loss_scale) == (8, 0, None)


def seen(losses: list[float], *, min_improvement: float = 0.0) -> tuple[EarlyStopping, list[bool]]:
    watch = EarlyStopping()
    return watch, [watch.see(step, loss, min_improvement=min_improvement) for step, loss in enumerate(losses)]


def test_the_base_is_a_comparison_and_never_the_best() -> None:
    watch, best = seen([1.0, 3.0, 2.0])
    assert (watch.base_loss, watch.best_loss, watch.best_step) == (1.0, 2.0, 2)
    assert best == [False, True, True]


def test_patience_counts_evaluations_since_the_last_improvement() -> None:
    watch, best = seen([9.0, 3.0, 2.0, 2.5, 2.0])
    assert best == [False, True, True, False, False]
    assert watch.stale == 2
    assert watch.exhausted(2)
    assert not watch.exhausted(3)
    assert not watch.exhausted(0)


def test_a_loss_far_above_the_base_is_a_divergence() -> None:
    watch, _ = seen([2.0])
    assert watch.diverged(12.1) and not watch.diverged(11.9)
    assert not EarlyStopping().diverged(100.0)  # without held-out rows there is nothing to compare with


def test_small_gains_are_kept_but_do_not_count() -> None:
    watch, best = seen([9.0, 3.0, 2.95, 2.91, 2.85], min_improvement=0.1)
    assert best == [False, True, True, True, True]
    assert watch.best_step == 4
    assert watch.stale == 0  # 2.85 is 0.15 below the 3.0 that counted last
    watch, _ = seen([9.0, 3.0, 2.95, 2.91], min_improvement=0.1)
    assert watch.stale == 2


def test_a_run_goes_on_with_other_micro_tokens_which_only_rounds_otherwise(tmp_path: Path) -> None:
    stopped(tmp_path / "run", 5)
    fewer = dataclasses.replace(SPEC, micro_tokens=24)
    outcome, _ = go(tmp_path / "run", fewer, resume=True)
    assert outcome.steps == SPEC.steps

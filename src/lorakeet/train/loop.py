"""Training, from top to bottom.

    step 0      held-out loss of the base
    each step   micro-batches → gradients, weighted by target tokens → checks → clip → AdamW → metrics; in float16 the loss is
                scaled (train/loss_scale), and a step that overflows is skipped
    at intervals  held-out loss → the best adapter into RUN/adapter → a checkpoint
    the end     all steps done, no further improvement, Ctrl-C, or a non-finite loss

A run is a function of its settings, rows and seed: on the CPU to the last bit, even when interrupted and resumed. Several
processes (train/processes) take the same steps, each over its part of the rows; the first one writes files and prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorakeet.errors import DataError, RunStopped, is_out_of_memory
from lorakeet.formats.identity import is_certified
from lorakeet.memory.allocator import keep_freed_memory, release_free_memory
from lorakeet.memory.cuda import cuda_device_of, gpu_peak_bytes, release_device_memory
from lorakeet.memory.measure import PeakMemory
from lorakeet.train import checkpoint, durable, gradients, rng, schedule
from lorakeet.train.checkpoint import BestTensors, Position, Snapshot
from lorakeet.train.interrupt import Interrupt
from lorakeet.train.log import MetricsLog, Sink, sink_for
from lorakeet.train.loss_scale import LossScale
from lorakeet.train.optimizer import Optimizer
from lorakeet.train.processes import ProcessLost
from lorakeet.train.progress import Record, Reporter
from lorakeet.train.pruning import cut_text
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.task import BatchT, Size, Task

Made = TypeVar("Made")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The task's parameters are then those of RUN/adapter, the best adapter."""

    steps: int
    planned_steps: int
    reason: str  # "all steps done", or why it ended earlier
    base_loss: float | None  # held-out, at step 0
    best_loss: float | None
    best_step: int | None
    learning_rate: float
    tokens: int
    seconds: float
    peak_bytes: int  # of the process; of its CUDA device where a budget bounds that
    skipped_steps: int = 0  # of `steps`
    loss_scale: float | None = None  # at the end; None where the loss is not scaled


def train(
    task: Task[BatchT],
    spec: TrainSpec,
    *,
    run: RunFolder,
    identity: Mapping[str, str | list[str]] | None = None,
    resume: bool = False,
    report: Reporter | None = None,
    interrupt: Interrupt | None = None,
    budget: int | None = None,
) -> Outcome:
    """Trains `task` and leaves the best adapter in RUN/adapter.

    `identity` names further values that must be equal on resume ({"data": hash, "lora": …}); of several hashes, one. With a
    `budget` in bytes the best adapter so far is stored on disk only, and exceeding the budget is reported once. Raises
    RunStopped after Ctrl-C, for a non-finite loss and when another process died, EnvironmentProblem for a full disk,
    VerificationFailed if a trained tensor gets no gradient, ConfigError if a run is resumed with other settings.
    """
    training = Training(task, spec, run=run, report=report or Reporter())
    release_free_memory()  # freed after reading rows and weights
    if budget is None:
        keep_freed_memory()
    else:
        training.budget, training.best = budget, BestTensors(run.best)
        training.cuda_device = cuda_device_of(training.parameters.values())
    alone = run.locked() if task.processes.first else nullcontext()  # no other process trains in this folder
    with alone, PeakMemory() as memory, interrupt or Interrupt() as stop:
        training.memory, stop.quiet = memory, not task.processes.first
        training.open(identity or {}, resume=resume)
        try:
            training.go(stop)
            return training.finish()
        except ProcessLost as lost:
            raise training.lost(lost) from lost
        finally:
            training.close()


class Training(Generic[BatchT]):
    """One run in progress."""

    memory: PeakMemory
    metrics: MetricsLog | None = None  # in the first process only, like the sink
    sink: Sink | None = None
    budget: int | None = None  # bytes; None after it was exceeded
    cuda_device: torch.device | None = None  # the CUDA device with the parameters, whose memory the budget bounds

    def __init__(self, task: Task[BatchT], spec: TrainSpec, *, run: RunFolder, report: Reporter) -> None:
        self.task, self.spec, self.run, self.processes = task, spec, run, task.processes
        self.report = report if self.processes.first else Reporter()
        self.parameters = task.parameters()
        self.optimizer = Optimizer(self.parameters, spec)
        self.learning_rate = spec.learning_rate if spec.learning_rate is not None else task.learning_rate
        self.total = spec.total_steps(task.steps_per_epoch)
        self.warmup = schedule.warmup_steps(self.total, spec.warmup_fraction)
        self.evaluate_every = spec.evaluation_interval(task.steps_per_epoch)
        self.checkpoint_every = spec.checkpoint_interval(task.steps_per_epoch)
        self.pruning = task.pruning
        self.at = Position(scale=LossScale.of(task.dtype))
        self.best = BestTensors()
        self.identity: dict[str, Any] = {}
        self.last_checkpoint: Path | None = None
        self.halved = ""  # what micro-batches have become, once the device has run out of memory

    def open(self, identity: Mapping[str, str | list[str]], *, resume: bool) -> None:
        """Starts at step 0, or at the newest intact checkpoint."""
        self.identity = checkpoint.run_identity(self.spec, identity, parameters=self.parameters, learning_rate=self.learning_rate)
        self.processes.require_equal(self.identity)
        rng.seed_all(self.spec.seed)
        self.processes.from_first(lambda: self._start(resume))
        self._sync_processes()
        self.earlier_seconds, self.started = self.at.seconds, time.perf_counter()
        self.report.begin(self.total, done=self.at.step)

    def _start(self, resume: bool) -> None:
        snapshot = checkpoint.load_newest(self.run.checkpoints, say=self.report.say) if resume else None
        if snapshot is not None:
            self._restore(snapshot)
        elif resume:
            self.report.say(f"{self.run.path} has no intact checkpoint yet; it starts again at step 0.")
        if resume and (snapshot is None or snapshot.best is None) and self.run.adapter.exists():
            durable.remove_folder(self.run.adapter)  # it is from a later state than the run
        with self._writing("metrics.jsonl"):
            self.metrics = MetricsLog(self.run.metrics, keep=self.at.metrics_bytes)
        self.sink = sink_for(self.spec.log_to, self.run.path, step=self.at.step)

    def _sync_processes(self) -> None:
        """Copies the state of the first process, except the best values so far."""
        if self.processes.count == 1:
            return
        self.processes.broadcast({**self.parameters, **self.task.fixed()}.values())
        at, last, moments, random = self.processes.from_first(
            lambda: (self.at, self.last_checkpoint, self.optimizer.state(), rng.states())
        )
        if not self.processes.first:
            self.at, self.last_checkpoint = at, last
            self.optimizer.load(moments)
            rng.restore(random)

    def go(self, stop: Interrupt) -> None:
        """Runs all steps, or until the run ends early."""
        if self.at.step == 0:
            if count := len(self.task.held_out_rows) // self.spec.answers:
                self.report.base_loss(count)
            self.evaluate()
            if self.processes.any(bool(stop.requested)):  # no step was taken that a checkpoint would keep
                why = stop.requested or "Another process was interrupted"
                raise RunStopped(f"{why}: stopped before the first step. Start it again with: {self.run.resume_command}")
        while self.at.step < self.total and not self.at.stopped:
            self.step()
            last = self.at.step == self.total
            if last or self.at.step % self.evaluate_every == 0:
                self.evaluate()
            interrupted = self.processes.any(bool(stop.requested))
            if last or interrupted or self.at.stopped or self.at.step % self.checkpoint_every == 0:
                self.save()
            if interrupted and not last and not self.at.stopped:
                why = stop.requested or "Another process was interrupted"
                raise RunStopped(
                    f"{why}: stopped after step {self.at.step} of {self.total}, with the checkpoint {self.last_checkpoint}."
                    f"{self._awaited()} Resume with: {self.run.resume_command}"
                )

    def step(self) -> None:
        """One optimizer step over the micro-batches of its rows."""
        start = time.perf_counter()
        step = self.at.step + 1
        size, loss = self._within_memory(lambda: self._passed(step), f"Step {step}")
        norm = gradients.gradient_norm(self.parameters)
        rate = self.learning_rate * schedule.factor(step, self.total, warmup=self.warmup, shape=self.spec.schedule)
        if fault := gradients.fault(self.parameters, loss, norm):
            self._skip(step, fault)
        else:
            self._advance(step - self.at.scale.skipped, loss, norm, rate)
        self.at.step, self.at.tokens = step, self.at.tokens + size.tokens
        now = time.perf_counter()
        record = {
            "step": step,
            "epoch": step / self.task.steps_per_epoch,
            "loss": loss,
            "tokens": size.tokens,
            "supervised": size.targets,
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens_per_second": size.tokens / (now - start),
            "seconds": self.earlier_seconds + now - self.started,
            "memory_bytes": self.memory.now(),
            **self.at.scale.record(),
        }
        self._write(record)
        self.report.step(record)
        self._watch_memory(step)
        if self.pruning is not None and (cut := self.pruning.after(step, self.optimizer)) is not None:
            self._write(cut)
            self.report.say(cut_text(cut))

    def _passed(self, step: int) -> tuple[Size, float]:
        """The size of a step and its loss, over all processes; the gradients are there."""
        batches = self.task.batches(step - 1)
        sizes = [self.task.size(batch) for batch in batches]
        counts = (sum(getattr(each, name) for each in sizes) for name in ("rows", "tokens", "targets"))
        size = Size(*self.processes.total(*counts))
        return size, self._accumulate(batches, size, step)

    def _within_memory(self, work: Callable[[], Made], what: str) -> Made:
        """The result of `work`. If the device runs out of memory, it is done again with micro-batches of half the size, once in a
        run. Raises RunStopped if that is not enough, or not possible.
        """
        device = next((parameter.device for parameter in self.parameters.values()), torch.device("cpu"))
        random = rng.drawn(device)
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).strip().splitlines()[0]  # the error holds what was in memory, and is dropped here
        self.optimizer.adamw.zero_grad(set_to_none=True)
        smaller = "" if self.halved or self.processes.count > 1 else self.task.halve()
        release_device_memory()
        if not smaller:
            also = f", also with {self.halved}" if self.halved else ""
            raise RunStopped(f"{what}: the device ran out of memory{also} ({said}). {self._kept()} {self._more_memory()}")
        self.halved = smaller
        self.report.say(f"{what}: the device ran out of memory ({said}). It is done again, and the run goes on, with {smaller}.")
        rng.draw_from(random, device)
        return self._within_memory(work, what)

    def _more_memory(self) -> str:
        """What to do about too little memory."""
        return (
            f"Close other programs that use its memory and go on with: {self.run.resume_command}. Or start a new run with fewer "
            "train.micro_tokens, shorter rows (data.max_tokens), model.quantize nf4 or a memory.budget."
        )

    def _peak(self) -> int:
        """Peak bytes of the memory that the budget bounds: of the process, or on its CUDA device."""
        return self.memory.now() if self.cuda_device is None else gpu_peak_bytes(self.cuda_device)

    def _watch_memory(self, step: int) -> None:
        """Reports once if the peak memory exceeds the budget."""
        peak = self._peak()
        if self.budget is not None and peak > self.budget:
            where = "" if self.cuda_device is None else f" on {self.cuda_device}"
            self.report.say(
                f"Step {step}: peak memory is {peak:,} bytes{where}, above the budget of {self.budget:,}. The run "
                "continues; please report the model and the settings."
            )
            self.budget = None

    def _accumulate(self, batches: Sequence[BatchT], whole: Size, step: int) -> float:
        """Accumulates the gradients of the step's mean loss, and returns the loss.

        Each micro-batch counts by its target tokens: Σ losses / (all targets of the step), never a mean of means. Each process
        computes its rows; losses and gradients are summed over processes.
        """
        if whole.targets == 0:
            raise DataError(
                f"No token of the {whole.rows} rows of step {step} is supervised; check data.supervise and data.max_tokens."
            )
        supervised = [batch for batch in batches if self.task.size(batch).targets]
        loss = self.processes.summed(self.task.gradients(supervised, whole.targets / self.at.scale.value)).item() / whole.targets
        self.processes.sum_gradients(self.parameters.values())
        self.at.scale.unscale(self.parameters)
        gradients.hold_terms(self.parameters, self.task.kept_terms)
        return loss

    def _advance(self, number: int, loss: float, norm: Tensor, rate: float) -> None:
        """Takes optimizer step `number`, skipped ones not counted."""
        if number <= 2 and not self._diverged(loss):  # a diverged model has zero gradients everywhere
            gradients.require_gradients(self.parameters, number)
        if self.pruning is not None:
            self.pruning.see(self.at.step + 1, self.parameters)
        gradients.clip(self.parameters, self.spec.clip_norm, norm=norm)
        self.optimizer.step(rate)
        self.at.scale.record_step()

    def _skip(self, step: int, fault: str) -> None:
        """Drops the gradients of a step. Only a float16 run continues, with half the loss scale."""
        self.optimizer.adamw.zero_grad(set_to_none=True)
        scale = self.at.scale
        if not scale.dynamic:
            self._stop_diverged(f"Step {step}: {fault}. The step was not taken.")
        if not scale.overflowed():
            raise RunStopped(
                f"Step {step}: {fault}. {scale.skipped} steps overflowed model.dtype float16 at every loss scale. "
                f"{self._kept()} Start a new run with model.dtype bfloat16, or float32 without bfloat16 support."
            )
        self.report.say(f"Step {step}: {fault}. It is skipped, and the loss scale is now {scale.value:,g}.")

    def evaluate(self) -> None:
        """Computes the held-out loss with its interval; writes the best adapter so far to RUN/adapter."""
        held_out = self._within_memory(self.task.held_out, f"The held-out evaluation after step {self.at.step}")
        if held_out is None or len(held_out.sums) == 0:
            return
        if not np.isfinite(held_out.sums).all():
            self._stop_diverged(f"Step {self.at.step}: the held-out loss is not finite.")
        estimate = held_out.mean(seed=self.spec.seed)
        watch = self.at.watch
        if self._diverged(estimate.value):
            self._stop_diverged(
                f"Step {self.at.step}: training diverged, the held-out loss is {estimate.value:.4g} and was "
                f"{watch.base_loss:.4g} before training."
            )
        low, high = (None, None) if estimate.why_none else (estimate.low, estimate.high)
        record: Record = {
            "step": self.at.step, "held_out_loss": estimate.value, "low": low, "high": high, "n": estimate.n, **held_out.more
        }
        self._write(record)
        self.report.held_out(record)
        counts = self.pruning is None or self.pruning.counts(self.at.step)
        if counts and watch.see(self.at.step, estimate.value, min_improvement=self.spec.min_improvement):
            self.processes.from_first(self._keep)
        if watch.exhausted(self.spec.patience):
            self.at.stopped = (
                f"no improvement in {watch.stale} evaluations after step {watch.best_step} (held-out loss {watch.best_loss:.4f})"
            )

    def _keep(self) -> None:
        """Stores the current values as the best so far."""
        with self._writing("The best adapter so far"):
            self.best.keep(self.parameters)
        self._publish()

    def save(self) -> None:
        """Writes a checkpoint; all processes wait until it is complete."""
        self.last_checkpoint = self.processes.from_first(self._save)

    def _save(self) -> Path:
        with self._writing(f"The checkpoint of step {self.at.step}"):
            if self.metrics is not None:
                self.metrics.flush()
                self.at.metrics_bytes = self.metrics.offset
            self.at.seconds = self.earlier_seconds + time.perf_counter() - self.started
            snapshot = Snapshot(
                self.at, {**self.parameters, **self.task.fixed()}, self.optimizer.state(), rng.states(), self.best.tensors,
                {"same": self.identity, "environment": checkpoint.environment(self.processes.count)},
                self.pruning.importance.state() if self.pruning is not None else {},
            )  # fmt: skip
            return checkpoint.save(self.run.checkpoints, snapshot, keep=self.spec.keep_checkpoints)

    def finish(self) -> Outcome:
        """Restores the best adapter in the model of every process, and writes it to RUN/adapter."""
        self.processes.from_first(self._restore_best)
        self.processes.broadcast(self.parameters.values())
        watch = self.at.watch
        return Outcome(
            steps=self.at.step,
            planned_steps=self.total,
            reason=self.at.stopped or "all steps done",
            base_loss=watch.base_loss,
            best_loss=watch.best_loss,
            best_step=watch.best_step if watch.best_step is not None else self.at.step,
            learning_rate=self.learning_rate,
            tokens=self.at.tokens,
            seconds=self.earlier_seconds + time.perf_counter() - self.started,
            peak_bytes=self._peak(),
            skipped_steps=self.at.scale.skipped,
            loss_scale=self.at.scale.value if self.at.scale.dynamic else None,
        )

    def _restore_best(self) -> None:
        if self.best.tensors is not None:
            checkpoint.copy_into(self.parameters, self.best.tensors)
        self._publish()

    def lost(self, why: ProcessLost) -> RunStopped:
        """The error of a run whose other process died, perhaps before it confirmed a checkpoint."""
        self.last_checkpoint = next(reversed(checkpoint.found(self.run.checkpoints)), self.last_checkpoint)
        return RunStopped(f"After step {self.at.step}: {why}. {self._kept()} Resume with: {self.run.resume_command}")

    def close(self) -> None:
        self.best.close()
        self.report.close()
        for written in (self.metrics, self.sink):
            if written is not None:
                written.close()

    def _restore(self, snapshot: Snapshot) -> None:
        """Restores a checkpoint, with RUN/adapter as it was then."""
        checkpoint.require_same(snapshot.identity["same"], self.identity, run=self.run.path)
        if changed := checkpoint.changes(snapshot.identity["environment"], checkpoint.environment(self.processes.count)):
            self.report.say(changed)
        if self.pruning is not None:
            self.pruning.take_over(snapshot.shapes, snapshot.importance, self.optimizer)
        if snapshot.best is not None:
            checkpoint.copy_into(self.parameters, snapshot.best)
            self._keep()
        checkpoint.copy_into({**self.parameters, **self.task.fixed()}, snapshot.trained)
        self.optimizer.load(snapshot.moments)
        rng.restore(snapshot.random)
        self.at = snapshot.position
        self.last_checkpoint = self.run.checkpoints / checkpoint.step_name(self.at.step)

    def _publish(self) -> None:
        with self._writing("The adapter"), durable.new_folder(self.run.adapter) as folder:
            self.task.save(folder)
            if self.run.certificate.exists() and not is_certified(folder, self.run.certificate):  # of an earlier end
                self.run.certificate.unlink()

    def _write(self, record: Record) -> None:
        if self.metrics is None:
            return
        with self._writing("metrics.jsonl"):
            self.metrics.write(record)
        if self.sink is not None:
            with self._writing(f"The {self.spec.log_to} log"):
                self.sink.write(record)

    def _diverged(self, loss: float) -> bool:
        return self.at.watch.diverged(loss, nats=self.spec.registered.nats)

    def _stop_diverged(self, what: str) -> None:
        """Raises RunStopped. A resumed run would repeat the same step, so the remedy is a new run."""
        wider = ", or with model.dtype bfloat16 or float32 in place of float16" if self.at.scale.dynamic else ""
        raise RunStopped(
            f"{what} {self._kept()} Start a new run with a lower train.learning_rate (now {self.learning_rate:g}){wider}, "
            "and check the rows of that step if it happens again."
        )

    def _kept(self) -> str:
        watch = self.at.watch
        return kept_text(self.last_checkpoint, self.run.adapter, watch.best_loss, watch.best_step) + self._awaited()

    def _awaited(self) -> str:
        return "" if self.pruning is None else self.pruning.awaited(self.at.watch.best_step)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            previous = f" The previous checkpoint {self.last_checkpoint.name} is intact." if self.last_checkpoint else ""
            remedy = f"Free some space, then go on with: {self.run.resume_command}"
            raise durable.refusal(error, f"{what} could not be written in {self.run.path}", remedy, previous) from error


def kept_text(checkpoint: Path | None, adapter: Path, loss: float | None, step: int | None) -> str:
    """Names what a stopped run has kept: its newest checkpoint, and the best adapter with its held-out loss, if any."""
    kept = [f"the checkpoint {checkpoint}"] if checkpoint else []
    if loss is not None:
        kept.append(f"{adapter} (held-out loss {loss:.4f} at step {step})")
    return f"Kept: {' and '.join(kept)}." if kept else "No checkpoint was written yet."

"""Training steps of made-up rows on random weights, in a process of its own: seconds and FLOPs by phase, and the machine's rate.

The rate is measured anew after every timed step, since machines of clouds change their own by a tenth within minutes.

FLOPs are those of every matrix product and attention kernel that runs, counted as they are dispatched: frozen weights, pairs,
attention and head, forward and backward; of the flash kernel those of the scores that its causal mask lets through. Norms,
activations, dequantisation and the optimizer are none: they cost time only.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contenders.planned_run import random_model, read_settings
from lorakeet.config import RunConfig
from lorakeet.data.chat import Example
from lorakeet.memory.allocator import keep_freed_memory
from lorakeet.memory.ledger import FLOPS
from lorakeet.memory.measure import peak_bytes
from lorakeet.memory.onednn_code import limit_code_cache
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.model import TextModel
from lorakeet.planning.rehearse_text import silent_training
from lorakeet.train import gradients
from lorakeet.train.text.multi_adapter import Member, MultiAdapterTraining
from lorakeet.train.text.task import TextTask

StepOf = Callable[["dict[str, int] | None"], "dict[str, float]"]  # FLOPs by phase to count into (None: not); seconds by phase
RATE = 1e-4
UNTIMED = 2  # steps in which kernels are made
PROBES = ((2048, 2048, 2048), (1024, 576, 1536), (1024, 1536, 576))  # tokens, in, out: the best rate of these is the machine's
PROBE_REPEATS = 12
LEARNT = {"all": 1.0, "completion": 0.25}  # of a row's tokens; "label": the last one alone


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        return result


def answer(measure: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Writes the answer of `measure` to the process's request (harness/processes.answered), with a run's memory settings."""
    limit_code_cache()
    keep_freed_memory()
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(measure(asked)), encoding="utf-8")


def measured(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`asked`: settings and shape as of planned_run, rows' `lengths`, which tokens are targets, and how many `steps` are timed
    after the `untimed` ones.

    With `members` the rows are divided among so many adapters, which are trained in one pass.
    """
    config, precision = read_settings(asked)
    text = random_model(asked["shape"], config, precision)
    rows = [made_up(length, asked["learnt"], number) for number, length in enumerate(asked["lengths"])]
    step_of = one_adapter(text, config, rows) if "members" not in asked else _together(text, config, rows, asked["members"])
    counted: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    rates: list[float] = []
    untimed = asked.get("untimed", UNTIMED)
    for step in range(untimed + asked["steps"]):
        for phase, spent in step_of(counted if step == 0 else None).items():
            if step >= untimed:
                seconds.setdefault(phase, []).append(spent)
        if step >= untimed:
            rates.append(rate(precision.products))
    return {
        "tokens": sum(asked["lengths"]),
        "seconds": seconds,
        "flops": counted,
        "rate": statistics.median(rates),
        "rates": rates,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
    }


def one_adapter(text: TextModel, config: RunConfig, rows: list[Example]) -> StepOf:
    """Steps of one adapter over all rows: seconds by phase."""
    return step_of(initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0), config, rows)


def step_of(text: TextModel, config: RunConfig, rows: list[Example]) -> StepOf:
    """The same over a model that has the adapter already."""
    training = silent_training(TextTask(text, rows, held_out=(), spec=config.train), config.train)
    loss: torch.Tensor | None = None

    def step(counted: dict[str, int] | None) -> dict[str, float]:
        nonlocal loss
        began = time.perf_counter()
        batches = training.task.batches(0)
        targets = sum(batch.targets for batch in batches)
        spent = {"forward": 0.0, "backward": 0.0}
        for batch in batches:
            with _phase("forward", spent, counted):
                loss = training.task.loss(batch) / targets
            with _phase("backward", spent, counted):
                loss.backward()
        norm = gradients.gradient_norm(training.parameters)
        gradients.clip(training.parameters, training.spec.clip_norm, norm=norm)
        training.optimizer.step(RATE)
        return {**spent, "rest": time.perf_counter() - began - sum(spent.values())}

    return step


def _together(text: TextModel, config: RunConfig, rows: list[Example], members: int) -> StepOf:
    """Steps of several adapters in one pass, each with its share of the rows."""
    spec = replace(config.train, batch_size=len(rows) // members, steps=1 << 20, learning_rate=RATE)
    plan, found = plan_for(text.model, config.lora, text.family), []
    for number in range(members):
        initialise_adapter(text, plan, seed=number, name=f"member_{number}")
        found.append(Member(f"member_{number}", spec, rows[number::members], ()))
    many = MultiAdapterTraining(text, found)

    def step(counted: dict[str, int] | None) -> dict[str, float]:
        spent = {"step": 0.0}
        with _phase("step", spent, counted):
            many.round()
        return spent

    return step


@contextmanager
def _phase(name: str, spent: dict[str, float], counted: dict[str, int] | None) -> Iterator[None]:
    """Adds the seconds of the context to `spent`, and with `counted` its FLOPs to that (a counted phase is slower)."""
    start, counter = time.perf_counter(), Counter()
    with counter if counted is not None else nullcontext():
        yield
    spent[name] += time.perf_counter() - start
    if counted is not None:
        counted[name] = counted.get(name, 0) + counter.flops


def rate(products: torch.dtype) -> float:
    """FLOP/s of the fastest plain product on this machine in that dtype: the best of some shapes, each repeated."""
    best = 0.0
    for tokens, width, out in PROBES:
        left, right = torch.randn(tokens, width).to(products), torch.randn(out, width).to(products)
        for _ in range(PROBE_REPEATS):
            start = time.perf_counter()
            torch.mm(left, right.t())
            best = max(best, 2 * tokens * width * out / (time.perf_counter() - start))
    return best


def made_up(length: int, learnt: str, number: int) -> Example:
    """Random tokens, of which the last ones are targets."""
    count = 1 if learnt == "label" else min(length - 1, max(1, round(LEARNT[learnt] * length)))
    draw = random.Random(number)
    ids = np.array([draw.randrange(3, 4000) for _ in range(length)], np.int64)
    return Example(ids, np.arange(length) >= length - count, str(number), None, False)


if __name__ == "__main__":
    answer(measured)

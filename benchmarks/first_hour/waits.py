"""Stage e: every place where the host waits for the GPU in a step, by torch's own watch."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.packed_workload import RANK, drawn_steps, example_of
from harness.made_up_model import frozen_text

from first_hour.contender import settings_of
from first_hour.findings import Findings
from first_hour.losses import small_shape
from lorakeet.data.chat import Example
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.planning.rehearse_text import silent_training
from lorakeet.train.text.task import TextTask

SAID = "synchroniz"
WARM, COUNTED = 2, 2  # steps
MOST = 3  # of a step


def run(found: Findings) -> None:
    shape = small_shape(toy=found.toy)
    tokens = 64 if found.toy else 2048
    rows = drawn_steps(tokens, WARM + COUNTED, 0, words=(3, 300))
    alone = [example_of(row) for row in sorted((row for step in rows for row in step), key=lambda row: int(row.prompt))]
    prefix = np.arange(3, 3 + tokens // 16)
    shared = [_behind(prefix, row) for row in alone]
    for name, examples, micro, moments in (
        ("rows alone", alone, tokens, "float32"),
        ("rows that share a beginning, two micro-batches", shared, tokens // 2 + len(prefix), "float32"),
        ("moments in 8 bits", alone, tokens, "8bit"),
    ):
        for base in ("none", "nf4"):
            found.attempt(f"{name}, {base}", lambda e=examples, m=micro, o=moments, b=base: _counted(found, shape, b, e, m, o))


def _behind(prefix: Any, row: Example) -> Example:
    """The row with a beginning that others have too."""
    supervised = np.concatenate([np.zeros(len(prefix), bool), row.supervised])
    return Example(np.concatenate([prefix, row.ids]), supervised, row.key, None, False)


def _counted(
    found: Findings, shape: dict[str, Any], base: str, examples: list[Example], micro: int, moments: str
) -> dict[str, Any]:
    """Waits of a step by place, once kernels are made."""
    text = frozen_text(shape, found.device, found.dtype, base=base)
    longest = max(len(example.ids) for example in examples)
    config = settings_of(
        longest, WARM + COUNTED, len(examples) // (WARM + COUNTED), **{"train.micro_tokens": str(micro), "train.moments": moments}
    )
    text = initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0)
    assert config.lora.rank == RANK
    training = silent_training(TextTask(text, examples, held_out=(), spec=config.train), config.train)
    for _ in range(WARM):
        training.step()
    batches = len(training.task.batches(WARM))
    places = waits_of(lambda: [training.step() for _ in range(COUNTED)], found.device)
    total = sum(places.values())
    return {
        "micro_batches": batches, "waits_a_step": total / COUNTED if found.device.type == "cuda" else None,
        "places": {place: count / COUNTED for place, count in places.most_common()},
    }  # fmt: skip


def waits_of(action: Callable[[], object], device: torch.device) -> Counter[str]:
    """How often the host waited for a CUDA device, by the place in the code. On a CPU nothing is seen."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    for one in said:
        if re.search(SAID, str(one.message)):
            places[f"{_short(one.filename)}:{one.lineno}"] += 1
    return places


def _short(path: str) -> str:
    parts = Path(path).parts
    for package in ("lorakeet", "torch"):
        if package in parts:
            return os.sep.join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return parts[-1]

"""A short run of any settings in a process of its own, which reports the memory that each phase used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.memory.allocator import release_free_memory, return_freed_memory
from lorakeet.memory.measure import peak_bytes, reset_peak, resident_bytes
from lorakeet.memory.onednn_code import limit_code_cache
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.planning.forecast_text_run import (
    LOAD,
    decomposes,
    evaluation_of,
    largest_rows,
    reads_weights,
    text_runtime_bytes,
)
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import BEGIN, CHECKPOINT, EVALUATE, STEP, training_on
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.packed import PackedBase
from lorakeet.train.checkpoint import BestTensors
from lorakeet.train.log import MetricsLog
from lorakeet.train.run import RunFolder
from lorakeet.verbs import finetune  # noqa: F401 - what a run has in memory before it begins

STEPS = 2
GPTQ_SCALE = 0.004  # of random codes: weights as large as those that a model begins with
PACKED_SCALE = 0.001  # the same for codes of a byte


def main() -> None:
    limit_code_cache()  # as loading does for a run
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = _runtime(asked) if asked.get("runtime") else _phases(asked)
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def read_settings(asked: Mapping[str, Any]) -> tuple[RunConfig, Precision]:
    """The run's settings, and how its weights are kept and multiplied."""
    config = read_run(None, {"data.train": "none", "model.path": "made-up", **asked["settings"]})
    dtype = getattr(torch, config.model.dtype)
    products = dtype if config.model.products == "auto" else getattr(torch, config.model.products)
    return config, Precision(dtype, products, config.model.quantize)


def _runtime(asked: Mapping[str, Any]) -> dict[str, int]:
    config, precision = read_settings(asked)
    return {"runtime": text_runtime_bytes(precision, counts=1, decomposing=decomposes(config))}  # these rows are all alike


def _phases(asked: Mapping[str, Any]) -> dict[str, int]:
    """The most resident bytes in each phase."""
    config, precision = read_settings(asked)
    peaks: dict[str, int] = {"start": resident_bytes()}
    if asked["returning"] and not return_freed_memory():
        raise SystemExit("this C library does not take orders about freed memory")
    store = Path(asked["store"]) if asked.get("store") else None
    if asked["shape"] is None:
        with _peak(peaks, LOAD):
            text = load_text_model(config.model, store=store)
    else:
        text = random_model(asked["shape"], config, precision)
    with TemporaryDirectory() as folder:
        with _peak(peaks, BEGIN) if reads_weights(config) else nullcontext():
            initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0)
        if reads_weights(config):
            release_free_memory()  # as a run does then
        rows = largest_rows(config)
        training = training_on(text, config.train, rows, 2 if config.train.batch_size > rows.count else 1)
        training.run = RunFolder.create(Path(folder) / "run")
        training.metrics = MetricsLog(training.run.metrics)
        if asked["returning"]:  # as a run under a budget
            training.best = BestTensors(training.run.best)
        training.task.held_out_rows = training_on(text, config.train, evaluation_of(config).rows).task.train
        with _peak(peaks, STEP):
            for _ in range(STEPS):
                training.step()
        training.task.spec = replace(training.task.spec, micro_tokens=config.train.micro_tokens)  # also beyond a small batch
        with _peak(peaks, EVALUATE):
            training.evaluate()
        with _peak(peaks, CHECKPOINT):
            training.save()
        training.close()
    return peaks


@contextmanager
def _peak(peaks: dict[str, int], phase: str) -> Iterator[None]:
    if not reset_peak():
        raise SystemExit("this system does not let a process reset its peak of memory")
    yield
    peaks[phase] = peak_bytes()


def random_model(shape: Mapping[str, Any], config: RunConfig, precision: Precision) -> TextModel:
    """Random weights of that shape; every page is written, as if it had been loaded."""
    text = model_from_config(
        config_from_settings(dict(shape)),
        name="made-up",
        dtype=precision.dtype,
        products=precision.products,
        quantize=precision.quantize,
    )
    for base in text.model.modules():
        if isinstance(base, GptqBase):  # rows that are alike would leave attention without gradients
            base.qweight.random_()
            base.qzeros.random_()
            base.scales.fill_(GPTQ_SCALE)
        elif isinstance(base, PackedBase):
            for buffer in base.buffers():
                if buffer.is_floating_point():
                    buffer.fill_(PACKED_SCALE)
                elif buffer.dtype == torch.int8:
                    buffer.random_(-127, 128)
                else:
                    buffer.random_()
    return text


if __name__ == "__main__":
    main()

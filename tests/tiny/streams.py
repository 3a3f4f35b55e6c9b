"""The same tiny model twice, resident and streamed from a store, and a few steps of training over either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.loop import train
from lorakeet.train.progress import Record, Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask


def rows(count: int, *, seed: int = 0, vocabulary: int = 90) -> list[Example]:
    """Random rows of 4 to 19 tokens, the second half supervised."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(generator.integers(4, 20))
        ids = generator.integers(5, vocabulary, size=length)
        found.append(Example(ids, np.arange(length) >= length // 2, f"{seed}-{number}", None, False))
    return found


def loaded(
    folder: Path,
    store: Path | None = None,
    *,
    method: str = "none",
    dtype: str = "float32",
    slots: int = 2,
    int8_products: bool = False,
) -> TextModel:
    """The model in `folder`, resident, or streamed from a store in the folder `store` with `slots` blocks in memory."""
    quantize = QuantSpec(method=method, int8_products=int8_products)  # type: ignore[arg-type]
    spec = ModelSpec(path=str(folder), dtype=dtype, products=dtype, device="cpu", quantize=quantize)  # type: ignore[arg-type]
    return load_text_model(spec, store=store, slots=slots, say=lambda _: None)


class Losses(Reporter):
    """Keeps every loss of a run, on training and on held-out rows."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def step(self, record: Record) -> None:
        self.seen.append((record["loss"], record["grad_norm"]))

    def held_out(self, record: Record) -> None:
        self.seen.append(record["held_out_loss"])


def trained(text: TextModel, out: Path, *, steps: int, lora: LoraSpec, **streaming: Any) -> tuple[list[Any], bytes]:
    """Every loss and gradient norm of `steps` steps of 3 to 4 micro-batches, and the bytes of the adapter."""
    spec = TrainSpec(steps=steps, batch_size=6, micro_tokens=30, learning_rate=1e-2, evaluate_every=10, patience=0)
    plan = plan_for(text.model, lora, text.family)
    initialise_adapter(text, plan, seed=0, token_ids=text.add_tokens(lora.new_tokens))
    task = TextTask(text, rows(24), held_out=rows(5, seed=1), spec=spec, **streaming)
    losses = Losses()
    torch.manual_seed(0)
    train(task, spec, run=RunFolder.create(out), report=losses)
    return losses.seen, (out / "adapter" / "adapter_model.safetensors").read_bytes()

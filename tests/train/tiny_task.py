"""A real task of the loop that trains in milliseconds: two adapted linear layers between a frozen embedding and a frozen head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorakeet.core.adapter import Adapter
from lorakeet.core.layers.linear import LoraLinear, dense_base_of, new_pair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.data.batches import StepOrder
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches
from lorakeet.formats.peft import peft
from lorakeet.train.processes import ALONE
from lorakeet.train.pruning import Pruning
from lorakeet.train.spec import TrainSpec
from lorakeet.train.task import NONE_KEPT, HeldOut, KeptTerms, Size, gradients_by_batch
from lorakeet.train.text.loss import text_loss

VOCAB, HIDDEN = 40, 16


def examples(count: int, *, seed: int) -> list[Example]:
    """Rows of a noisy cycle through the vocabulary, 4 to 19 tokens long, of which the last half is supervised."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(generator.integers(4, 20))
        ids = (generator.integers(VOCAB) + 7 * np.arange(length)) % VOCAB
        noise = generator.random(length) < 0.1
        ids = np.where(noise, generator.integers(VOCAB, size=length), ids).astype(np.int64)
        supervised = np.arange(length) >= length // 2
        rows.append(Example(ids=ids, supervised=supervised, key=f"{seed}-{number}", label=None, truncated=False))
    return rows


class TinyText(nn.Module):
    """What text_loss asks of a TextModel; the hidden state of a token sees that token alone."""

    kernels = None

    def __init__(self, *, dropout: float = 0.0, start: str = "kaiming") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(VOCAB, HIDDEN, generator=generator))
        for name in ("first", "second"):
            linear = nn.Linear(HIDDEN, HIDDEN, bias=False).requires_grad_(False)
            linear.weight.copy_(torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5)
            layer = LoraLinear(linear, dense_base_of(linear, "linear"))
            entry = PlanEntry(name, "linear", (HIDDEN, HIDDEN), 4, 12.0, dropout=dropout, start=start)  # type: ignore[arg-type]
            layer.attach("default", new_pair(entry, weight=lambda linear=linear: linear.weight, seed=0))
            layer.active = "default"
            setattr(self, name, layer)
        self.head_weight = torch.randn(VOCAB, HIDDEN, generator=generator)

    def pairs(self) -> dict[str, LoraPair]:
        return {name: getattr(self, name).adapters["default"] for name in ("first", "second")}

    def hidden(self, batch: Batch) -> Tensor:
        x = self.embedding(batch.ids)
        return (x + self.second(torch.tanh(self.first(x))))[batch.target_positions]

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head_weight.t()


class TinyTask:
    """The Task of train/task over a TinyText."""

    learning_rate = 0.02
    dtype = torch.float32
    processes = ALONE
    pruning: Pruning | None = None
    kept_terms: KeptTerms = NONE_KEPT

    def __init__(
        self, spec: TrainSpec, *, rows: int = 48, held_out: int = 12, dropout: float = 0.1, start: str = "kaiming"
    ) -> None:
        self.text = TinyText(dropout=dropout, start=start)
        self.rows = examples(rows, seed=5)
        self.held_out_rows = examples(held_out, seed=6)
        self.spec = spec
        self.order = StepOrder(rows, spec.batch_size, spec.seed)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def parameters(self) -> dict[str, Parameter]:
        return {f"{name}.{key}": getattr(pair, key) for name, pair in self.text.pairs().items() for key in ("A", "B")}

    def fixed(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, pair in self.text.pairs().items() for key, value in pair.named_buffers()}

    def batches(self, step: int) -> Sequence[Batch]:
        return micro_batches([self.rows[row] for row in self.order.indices(step)], self.spec.micro_tokens)

    def size(self, batch: Batch) -> Size:
        return Size(rows=len(batch.lengths), tokens=batch.tokens, targets=batch.targets)

    def gradients(self, batches: Sequence[Batch], targets: float) -> Tensor:
        return gradients_by_batch(self.loss, batches, targets)

    def loss(self, batch: Batch) -> Tensor:
        self.text.train()
        return text_loss(self.text, batch)[0]

    def held_out(self) -> HeldOut | None:
        if not self.held_out_rows:
            return None
        self.text.eval()
        sums, weights = [], []
        with torch.no_grad():
            for batch in micro_batches(self.held_out_rows, 1):
                loss, count = text_loss(self.text, batch)
                sums.append(loss.item())
                weights.append(float(count))
        return HeldOut(np.array(sums), np.array(weights))

    def halve(self) -> str:
        if self.spec.micro_tokens < 2:
            return ""
        self.spec = replace(self.spec, micro_tokens=self.spec.micro_tokens // 2)
        return f"train.micro_tokens {self.spec.micro_tokens}"

    def adapter(self) -> Adapter:
        return Adapter({name: pair.value() for name, pair in self.text.pairs().items()}, base="tiny")

    def save(self, folder: Path) -> None:
        peft.write(self.adapter(), folder)

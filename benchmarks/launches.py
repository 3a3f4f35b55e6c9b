"""Claim: a card computes for longer than launching takes, up to 10 µs an operation, with 2,048 tokens of 8B or 8,192 of 1B.

    python benchmarks/launches.py [--rate 400]

Counted on shapes, as if on a CUDA card, without one: the operations of a training step that launch kernels there (views and
empty tensors launch none), for two depths of a model, which gives those of a block and those of the rest; and the FLOPs of a step
of one micro-batch. Dense weights: each that is packed is brought back by one operation or a few more. The rate is an assumption,
to be given for other cards: 400 TFLOP/s, about what plain bf16 products reach on an H100. "Even" is how long an operation may
take the host until the card waits for it: a fast one launches in 5 µs. Rows of 512 tokens, packed, half of each learnt. **Not run
on a GPU.**
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contenders.planned_run import read_settings
from harness.machine import origin, write_result
from plan_accuracy import published_shape
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.core.device import standing_for
from lorakeet.memory.ledger import Ledger
from lorakeet.models.adapt import begin_adapter
from lorakeet.models.outline import config_from, outline
from lorakeet.models.targets import plan_for
from lorakeet.train.rehearsal import Rows, begin_moments, training_on

MODELS = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B")
TOKENS, LENGTH = (512, 2048, 8192), 512
FEW = (4, 6)  # blocks, whose difference is what a block asks for
CLAIMED = {MODELS[1]: 8192, MODELS[2]: 2048}  # tokens from which on the host may take LAUNCH
LAUNCH = 10e-6  # seconds
KERNELS = {"card_rows_backward": 5}  # of those that launch several: three, and two sums over groups of heads
CARD = torch.device("cuda")
QUIET = (  # operations that compute nothing
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "unbind", "detach", "alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided", "unfold",
    "device", "_local_scalar_dense", "_reshape_alias", "lift_fresh", "is_same_size", "set_", "resize_",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts by name the operations that launch kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name not in QUIET:
            self.found[name] += KERNELS.get(name, 1)
        return func(*args, **(kwargs or {}))


def step_of(model: str, blocks: int, tokens: int) -> tuple[int, int]:
    """Launches and FLOPs of a step of one micro-batch."""
    shape = published_shape(model, num_hidden_layers=blocks)
    settings = {
        "model.dtype": "bfloat16", "model.products": "bfloat16", "data.max_tokens": LENGTH, "train.micro_tokens": tokens,
        "lora.rank": 16, "train.learning_rate": 1e-4,
    }  # fmt: skip
    config, precision = read_settings({"settings": {key: str(value) for key, value in settings.items()}})
    with Ledger(shape["vocab_size"]) as ledger, standing_for(CARD):
        text = outline(config_from(shape), name="made-up", dtype=precision.dtype, products=precision.products)
        begin_adapter(text, plan_for(text.model, config.lora, text.family), seed=0)
        training = training_on(text, config.train, Rows(LENGTH, max(1, tokens // LENGTH), prompt=LENGTH // 2), 1)
        begin_moments(training)
        with ledger.phase("step"), Launches() as launches:
            training.step()
        ledger.close()
    return launches.found.total(), ledger.work["step"].flops


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=400.0, help="TFLOP/s of the card")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about, lines = origin(), []
    print(f"{'model':14} {'tokens':>6} {'a block':>8} {'the rest':>8} {'a step':>7} {'computing':>10} {'even':>8}")
    for model in MODELS:
        depth = published_shape(model)["num_hidden_layers"]
        for tokens in TOKENS:
            (few, of_few), (more, of_more) = (step_of(model, blocks, tokens) for blocks in FEW)
            apart = FEW[1] - FEW[0]
            block, rest = (more - few) / apart, few - (more - few) / apart * FEW[0]
            flops = of_few + (of_more - of_few) / apart * (depth - FEW[0])
            launches, computing = round(block * depth + rest), flops / given.rate / 1e12
            even = computing / launches
            lines.append({"model": model, "tokens": tokens, "of_block": block, "of_rest": rest, "launches": launches,
                          "flops": flops, "computing": computing, "even": even})  # fmt: skip
            print(
                f"{model.rpartition('/')[2]:14} {tokens:6} {block:8.1f} {rest:8.1f} {launches:7} {computing * 1e3:7.1f} ms "
                f"{even * 1e6:5.1f} µs",
                flush=True,
            )
    kept = all(line["even"] >= LAUNCH for line in lines if line["tokens"] >= CLAIMED.get(line["model"], TOKENS[-1] + 1))
    content = {"rate_tflops": given.rate, "lines": lines, "kept": kept}
    print(f"Written: {write_result('launches', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

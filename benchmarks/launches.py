"""Claim: a GPU computes longer than launching takes (10 µs each): 2,048 tokens of 8B, 8,192 of 1B, 2,048 of any with CUDA graphs.

    python benchmarks/launches.py [--rate 400]

Counted on shapes, without a GPU: the operations of the forward and backward pass of a micro-batch that launch kernels on a CUDA
device (views and empty tensors launch none), and their FLOPs. Two depths of a model give those of a block and those of the rest.
The optimizer's are few, for all parameters at once. Weights are dense; dequantising one takes one operation or a few. Three
variants are counted: torch's operations; norms, gates and rotary positions by Lorakeet's Triton kernels (`model.kernels triton`),
one operation each; and the decoder's passes as CUDA graphs (`train.cuda_graphs`), one operation each, beside copying rows into
their slots, the output head, and adding the gradients.

The rate is an assumption, to be given for other GPUs: 400 TFLOP/s, about what plain bf16 products reach on an H100. "Even" is how
long an operation may take the host until the GPU waits for it; a fast host launches in 5 µs. Rows of 512 tokens without a shared
prefix, packed, half of each a target. The host's other work (seeds, names of rows, checking each parameter) is not counted. **Not
run on a GPU.**
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from contenders.planned_run import read_settings
from harness.machine import origin, write_result
from plan_accuracy import published_shape
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.kernels.cpu import elementwise
from lorakeet.kernels.device import standing_for
from lorakeet.memory.ledger import Ledger
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.cuda_graphs import BatchShape, GraphedModel
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.workflows.planning.rehearse_text import RowShape, training_on

MODELS = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B")
TOKENS, LENGTH = (512, 2048, 8192), 512
KERNELS = ("torch", "triton", "graphs")  # of norms, gates and rotary positions; graphs: torch's, in CUDA graphs
FEW = (4, 6)  # blocks; the difference is what a block launches
CLAIMED = {MODELS[1]: 8192, MODELS[2]: 2048}  # tokens from which on the host may take LAUNCH a launch
RECORDED = 2048  # the same with CUDA graphs, for any model
LAUNCH = 10e-6  # seconds
SEVERAL = {"card_rows_backward": 6}  # of those that launch several: four, and two sums over groups of heads
CARD = torch.device("cuda")
AT_ONCE = 64  # tensors that a launch of torch's _foreach_ operations takes, two lists of them
QUIET = (  # operations that compute nothing
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "unbind", "detach", "alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided", "unfold",
    "device", "_local_scalar_dense", "_reshape_alias", "lift_fresh", "is_same_size", "set_", "resize_",
)  # fmt: skip

ResultT = TypeVar("ResultT")


class Launches(TorchDispatchMode):
    """Counts by name the operations that launch kernels. As a recorder (models/text/cuda_graphs) it counts what is recorded as
    one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.together = 0  # tensors that an operation for several has at once
        self.recording = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name not in QUIET and not self.recording:
            if name.startswith("_foreach"):
                self.together += len(args[0])
            else:
                self.found[name] += SEVERAL.get(name, 1)
        return func(*args, **(kwargs or {}))

    def warm(self, passes: Callable[[], ResultT]) -> ResultT:
        return self.record(passes)[1]

    def record(self, passes: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        self.recording = True
        try:
            return self.replay, passes()
        finally:
            self.recording = False

    def replay(self) -> None:
        self.found["a recorded pass"] += 1


class Unproved(GraphedModel):
    """CUDA graphs of shapes: there are no numbers to compare, nor to copy into slots, which takes four operations."""

    def _difference(self, *_: Any) -> str:
        return ""

    def _fill(self, *_: Any) -> None:
        for places in (self.ids, self.ids, self.positions, self.starts):
            places.zero_()


@contextmanager
def passes_by(kernels: str) -> Iterator[None]:
    """Triton's kernels run on no shapes; the operators in C, which are as many, do."""
    if kernels != "triton":
        yield
        return
    with ExitStack() as stack:
        for module in ("mlp_and_norm", "attention"):
            stack.enter_context(patch(f"lorakeet.core.fused.{module}.elementwise_ops", lambda *_, **__: elementwise))
        yield


def step_of(model: str, blocks: int, tokens: int, kernels: str) -> tuple[int, int, int]:
    """Of both passes of one micro-batch: launches, but for those of operations on several tensors at once; how many tensors these
    have; and FLOPs."""
    shape = published_shape(model, num_hidden_layers=blocks)
    settings = {
        "model.dtype": "bfloat16", "model.products": "bfloat16", "data.max_tokens": LENGTH, "train.micro_tokens": tokens,
        "lora.rank": 16, "train.learning_rate": 1e-4,
    }  # fmt: skip
    config, precision = read_settings({"settings": {key: str(value) for key, value in settings.items()}})
    with Ledger(shape["vocab_size"]) as ledger, standing_for(CARD):
        text = model_from_config(config_from_settings(shape), name="made-up", dtype=precision.dtype, products=precision.products)
        initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0)
        task = training_on(text, config.train, RowShape(LENGTH, max(1, tokens // LENGTH), prompt=LENGTH // 2), 1).task
        (batch,) = task.batches(0)
        launches = Launches()
        if kernels == "graphs":
            parameters, room = task.parameters(), BatchShape.largest(LENGTH, tokens, len(batch.lengths))
            task.replayed = Unproved(text, parameters, launches, room)
            task.loss(batch)  # what is recorded once is not counted
        with ledger.phase("passes"), passes_by(kernels), launches:
            task.loss(batch).backward()
        ledger.close()
    return launches.found.total(), launches.together, ledger.work["passes"].flops


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=400.0, help="TFLOP/s of the GPU")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about, lines = origin(), []
    known: dict[tuple[str, int], float] = {}
    print(f"{'model':14} passes {'tokens':>6} {'a block':>8} {'the rest':>8} {'in all':>7} {'computing':>10} {'even':>8}")
    for model, kernels, tokens in itertools.product(MODELS, KERNELS, TOKENS):
        depth = published_shape(model)["num_hidden_layers"]
        (few, tensors, of_few), (more, of_tensors, of_more) = (step_of(model, blocks, tokens, kernels) for blocks in FEW)
        apart = FEW[1] - FEW[0]
        block, rest = (more - few) / apart, few - (more - few) / apart * FEW[0]
        flops = known.setdefault((model, tokens), of_few + (of_more - of_few) / apart * (depth - FEW[0]))  # torch's: the first
        together = -(-(tensors + (of_tensors - tensors) // apart * (depth - FEW[0])) // AT_ONCE)
        launches, computing = round(block * depth + rest) + together, flops / given.rate / 1e12
        even = computing / launches
        lines.append({"model": model, "kernels": kernels, "tokens": tokens, "of_block": block, "of_rest": rest,
                      "launches": launches, "flops": flops, "computing": computing, "even": even})  # fmt: skip
        print(
            f"{model.rpartition('/')[2]:14} {kernels:6} {tokens:6} {block:8.1f} {rest:8.1f} {launches:7} "
            f"{computing * 1e3:7.1f} ms {even * 1e6:5.1f} µs",
            flush=True,
        )
    claimed = [
        line for line in lines
        if line["tokens"] >= (RECORDED if line["kernels"] == "graphs" else CLAIMED.get(line["model"], TOKENS[-1] + 1))
    ]  # fmt: skip
    kept = all(line["even"] >= LAUNCH for line in claimed)
    content = {"rate_tflops": given.rate, "lines": lines, "kept": kept}
    print(f"Written: {write_result('launches', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""Claim: a block of 8B launches at most 105 kernels in both passes, 145 with NF4; est. ahead of unsloth on an H100.

    python benchmarks/launches.py [--rate 700] [--bandwidth 2.7]

Counted on shapes, without a GPU: the operations of the forward and backward pass of a micro-batch that launch kernels on a CUDA
device (views and empty tensors launch none). Two depths of a model give those of a block and those of the rest. Later
micro-batches of a step add to gradients: the larger count is given. The optimizer's are few. Two
variants: torch's operations; norms, gates, rotary positions and the loss by liger-kernel's (kernels/liger), NF4 by those of
bitsandbytes, three a matrix. Of attention alone, in both passes: torch's flash kernel, the same with sinks (kernels/row_sinks),
and blocks of queries (kernels/blockwise_rows), each operation of each block.

**Every time is an estimate.** An operation takes its FLOPs at --rate TFLOP/s or its bytes at --bandwidth TB/s, whichever is
longer (an H100 reaches about 700 and 2.7). The host takes 5 µs for a launch of torch and 11 for one of Triton, as fused
kernels are (vLLM PR 34838 measured 8.7 on a fast host, tritonbench 11); it works beside the GPU. Unsloth is arithmetic on the
same operations: it multiplies pairs layer by layer, so that x is read and ∂x written for each of seven; with checkpointing,
its default, blocks pass forward twice. Rows of 512 tokens, packed, half of each a target. **Not run on a GPU.**
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from contenders.planned_run import read_settings
from harness.machine import origin, write_result
from plan_accuracy import published_shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakeet.core.fused.packed_attention import CausalRows
from lorakeet.kernels import blockwise_rows, flash_varlen
from lorakeet.kernels.cpu import elementwise
from lorakeet.kernels.device import standing_for
from lorakeet.kernels.row_sinks import SinkRows
from lorakeet.memory.ledger import FLOPS, Ledger
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import ShapeBase, config_from_settings, model_from_config
from lorakeet.planning.rehearse_text import RowShape, training_on
from lorakeet.quant.construct import empty_base

MODELS = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B")
TOKENS, LENGTH, RANK = (512, 2048, 8192), 512, 16
BASES = ("none", "nf4")
KERNELS = ("torch", "fused")  # of norms, gates and rotary positions
FEW = (2, 4)  # blocks; the difference is what a block launches
MOST = {"none": 105, "nf4": 145}  # launches of a block of 8B by fused kernels
LAUNCH = {"torch": 5e-6, "triton": 11e-6}  # seconds of the host
PEAK = 989e12  # of an H100, FLOP/s
SEVERAL = {"flash_rows_backward": 6, "norm_again": 2, "gated_backward_": 2}  # the first: four, and two sums over groups of heads
FUSED = ("norm", "norm_backward", "rotate_", "gated", "gated_backward_")  # Triton kernels of liger-kernel
NF4 = 3  # of a weight by bitsandbytes: block maxima from their codes, their mean, W
NF4_BYTES = 0.5 + 2 + 19 / 64  # read and written for each number: codes, bf16, and what a block's maximum takes in four launches
CARD = torch.device("cuda")
BY_BLOCKS = {"blockwise_rows": blockwise_rows.blockwise_rows, "blockwise_rows_backward": blockwise_rows.blockwise_rows_backward}
HEADS = 32, 8, 128  # of 8B: heads, heads of keys, and a head's width
ATTENTION = ("flash", "flash with sinks", "blocks of queries")
CAP = 50.0  # of scores, as Gemma 2 has it
AT_ONCE = 64  # tensors that a launch of torch's _foreach_ operations takes, two lists of them
QUIET = (  # operations that compute nothing
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "unbind", "detach", "alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided", "unfold",
    "device", "_local_scalar_dense", "_reshape_alias", "lift_fresh", "is_same_size", "set_", "resize_", "new_empty_strided",
)  # fmt: skip

ResultT = TypeVar("ResultT")


@dataclass
class Counts:
    """Launches of torch's kernels and of Triton's, by name; tensors of operations on several at once; estimated seconds of a GPU,
    and its FLOPs."""

    torch: Counter[str] = field(default_factory=Counter)
    triton: Counter[str] = field(default_factory=Counter)
    together: int = 0
    seconds: float = 0.0
    forward: float = 0.0  # of these, of the forward pass
    flops: int = 0

    @property
    def launches(self) -> int:
        return self.torch.total() + self.triton.total()


class Launches(TorchDispatchMode):
    """Counts the operations that launch kernels."""

    def __init__(self, rate: float, bandwidth: float) -> None:
        super().__init__()
        self.rate, self.bandwidth = rate, bandwidth
        self.counts = Counts()
        self.recording = self.paused = False
        self.below = False  # whether autograd is above, which makes of each operation those that it stands for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.below and func.namespace == "aten":
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        if name in BY_BLOCKS and not self.paused:
            self._by_blocks(BY_BLOCKS[name], args)
        elif name not in QUIET and not self.paused:
            self._price(func, args, kwargs or {}, result)
            if not self.recording:
                self._count(name, args)
        return result

    def _count(self, name: str, args: Any) -> None:
        if name.startswith("_foreach"):
            self.counts.together += len(args[0])
        else:
            (self.counts.triton if name in FUSED else self.counts.torch)[name] += SEVERAL.get(name, 1)

    def _by_blocks(self, operator: Callable[..., Any], args: Any) -> None:
        """Counts what an operator for shapes stands for: on a GPU its products come out in fp32, which is no launch more."""
        inner = Launches(self.rate, self.bandwidth)
        inner.below = True

        def wide(left: Tensor, right: Tensor) -> Tensor:
            found = torch.bmm(left, right)
            inner.paused = True
            found = found.float()
            inner.paused = False
            return found

        with patch.object(blockwise_rows, "_wide_bmm", wide), _nothing_kept(), inner:
            operator(*args)
        self.counts.seconds += inner.counts.seconds
        self.counts.flops += inner.counts.flops
        if not self.recording:
            self.counts.torch.update(inner.counts.torch)

    def _price(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds the operation's work to the GPU's."""
        count = FLOPS.get(getattr(func, "_overloadpacket", None))
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        moved = sum(each.numel() * each.element_size() for each in tensors)
        self.counts.flops += flops
        self.counts.seconds += max(flops / self.rate, moved / self.bandwidth)

    def warm(self, passes: Callable[[], ResultT]) -> ResultT:
        return self.record(passes)[1]

    def record(self, passes: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        self.recording = True
        try:
            return self.replay, passes()
        finally:
            self.recording = False

    def replay(self) -> None:
        self.counts.torch["a recorded pass"] += 1


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """A context of places of shapes, which no later pass over numbers may find."""
    kept = flash_varlen.sequences, blockwise_rows.keys_seen
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


@contextmanager
def passes_by(kernels: str) -> Iterator[None]:
    """Fused kernels for GPUs run on no shapes; the operators in C, which are as many, do."""
    if kernels != "fused":
        yield
        return
    with ExitStack() as stack:
        for module in ("mlp_and_norm", "attention"):
            stack.enter_context(patch(f"lorakeet.core.fused.{module}.elementwise_ops", lambda *_, **__: elementwise))
        yield


@contextmanager
def unpacking(launches: Launches, kernels: str) -> Iterator[None]:
    """A context in which bases of shapes are dequantised as real ones of their rows are: by torch, operation by operation, or by
    bitsandbytes.
    """

    def unpacked(base: ShapeBase, out: Tensor, first: int) -> Tensor:
        if kernels == "fused":
            launches.counts.torch["NF4 by bitsandbytes"] += NF4
            launches.counts.seconds += out.numel() * NF4_BYTES / launches.bandwidth
            return out
        launches.paused = True
        real = empty_base({**base.settings, "shape": tuple(out.shape)})
        launches.paused = False
        return real.unpack(out)

    with patch.object(ShapeBase, "unpack_by_torch", unpacked):
        yield


def counts_of(
    model: str, blocks: int, tokens: int, kernels: str, base: str = "none", *, rate: float = 700e12, bandwidth: float = 2.7e12
) -> list[Counts]:
    """What both passes of a step's first micro-batch launch, and those of a later one."""
    shape = published_shape(model, num_hidden_layers=blocks)
    settings = {
        "model.dtype": "bfloat16", "model.products": "bfloat16", "data.max_tokens": LENGTH, "train.micro_tokens": tokens,
        "lora.rank": RANK, "train.learning_rate": 1e-4, "model.quantize": base,
    }  # fmt: skip
    config, precision = read_settings({"settings": {key: str(value) for key, value in settings.items()}})
    found = []
    with Ledger(shape["vocab_size"]) as ledger, standing_for(CARD):
        made = {"dtype": precision.dtype, "products": precision.products, "quantize": precision.quantize}
        text = model_from_config(config_from_settings(shape), name="made-up", **made)
        initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0)
        task = training_on(text, config.train, RowShape(LENGTH, max(1, tokens // LENGTH), prompt=LENGTH // 2), 1).task
        (batch,) = task.batches(0)
        launches = Launches(rate, bandwidth)
        for _ in range(2):
            launches.counts = Counts()
            with ledger.phase("passes"), passes_by(kernels), unpacking(launches, kernels), launches:
                loss = task.loss(batch)
                launches.counts.forward = launches.counts.seconds
                loss.backward()
            found.append(launches.counts)
        ledger.close()
    return found


def attention_of(kind: str, tokens: int, length: int, *, rate: float = 700e12, bandwidth: float = 2.7e12) -> Counts:
    """What the attention of a block of 8B launches in both passes, over packed rows of `length` tokens in bf16."""
    heads, kv, width = HEADS
    laid = (length,) * (tokens // length), width**-0.5
    kernel: Any = blockwise_rows.BlockwiseRows(*laid, cap=CAP) if kind == ATTENTION[2] else flash_varlen.FlashVarlen(*laid)
    with Ledger(2) as ledger, standing_for(CARD), ledger.phase("passes"), Launches(rate, bandwidth) as launches:
        launches.paused = True
        states = [torch.randn(1, many, tokens, width, dtype=torch.bfloat16, requires_grad=True) for many in (heads, kv, kv)]
        sinks = [torch.zeros(heads)] if kind == ATTENTION[1] else []
        launches.paused = False
        out: Any = (SinkRows if sinks else CausalRows).apply(*states, *sinks, kernel)  # type: ignore[no-untyped-call]
        launches.paused = True
        grad = torch.ones_like(out)
        launches.paused = False
        torch.autograd.grad(out, states, grad)
    return launches.counts


@dataclass(frozen=True)
class Block:
    """What a block launches, in the micro-batch that launches more, and the rest of a model; seconds and FLOPs of both."""

    torch: float
    triton: float
    rest_torch: float
    rest_triton: float
    together: float
    seconds: float
    rest_seconds: float
    flops: float
    rest_flops: float
    forward: float  # seconds of a block's forward pass


def block_of(model: str, tokens: int, kernels: str, base: str = "none", **rates: float) -> Block:
    """A block's part and the rest, from two depths."""
    few, more = (counts_of(model, blocks, tokens, kernels, base, **rates) for blocks in FEW)
    apart = FEW[1] - FEW[0]
    which = max((0, 1), key=lambda number: more[number].launches - few[number].launches)
    one, other = few[which], more[which]

    def split(value: Callable[[Counts], float]) -> tuple[float, float]:
        block = (value(other) - value(one)) / apart
        return block, value(one) - block * FEW[0]

    of_torch, of_triton = split(lambda each: each.torch.total()), split(lambda each: each.triton.total())
    seconds, flops = split(lambda each: each.seconds), split(lambda each: each.flops)
    together, _ = split(lambda each: each.together)
    forward, _ = split(lambda each: each.forward)
    return Block(of_torch[0], of_triton[0], of_torch[1], of_triton[1], together, *seconds, *flops, forward)


def line_of(model: str, tokens: int, kernels: str, base: str, rates: dict[str, float]) -> dict[str, Any]:
    """The counts and estimates of a whole model."""
    depth, block = published_shape(model)["num_hidden_layers"], block_of(model, tokens, kernels, base, **rates)
    together = -(-int(block.together * depth) // AT_ONCE)
    launched = {"torch": block.torch * depth + block.rest_torch + together, "triton": block.triton * depth + block.rest_triton}
    host = sum(launched[kind] * LAUNCH[kind] for kind in LAUNCH)
    computing, flops = block.seconds * depth + block.rest_seconds, block.flops * depth + block.rest_flops
    longer = max(host, computing)  # they work beside each other
    return {
        "model": model, "base": base, "kernels": kernels, "tokens": tokens, "of_block": block.torch + block.triton,
        "of_block_triton": block.triton, "launches": sum(launched.values()), "forward": block.forward * depth,
        "host": host, "computing": computing, "flops": flops, "tokens_per_second": tokens / longer,
        "share_of_peak": flops / longer / PEAK,
    }  # fmt: skip


def unsloth_of(line: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    """Estimated tokens/s of unsloth on the operations of `line`, without and with its checkpointing."""
    shape = published_shape(line["model"])
    depth, tokens, hidden = shape["num_hidden_layers"], line["tokens"], shape["hidden_size"]
    state = 2 * tokens * hidden  # bytes of x
    more = depth * 3 * (state + 2 * state) / rates["bandwidth"]  # q, k, v and gate, up share one x: read thrice, ∂x thrice
    alone = line["computing"] + more
    return {"without checkpointing": tokens / alone, "with checkpointing": tokens / (alone + line["forward"])}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=700.0, help="TFLOP/s that products reach on the GPU")
    parser.add_argument("--bandwidth", type=float, default=2.7, help="TB/s that passes reach")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    rates = {"rate": given.rate * 1e12, "bandwidth": given.bandwidth * 1e12}
    about, lines = origin(), []
    print(f"{'model':14} base {'passes':6} {'tokens':>6} {'a block':>8} {'in all':>7} {'host':>9} {'GPU':>10} {'tokens/s':>9}")
    for model, base, kernels, tokens in itertools.product(MODELS, BASES, KERNELS, TOKENS):
        line = line_of(model, tokens, kernels, base, rates)
        if kernels == "fused" and model == MODELS[-1]:
            line["unsloth"] = unsloth_of(line, rates)
        lines.append(line)
        print(
            f"{model.rpartition('/')[2]:14} {base:4} {kernels:6} {tokens:6} {line['of_block']:8.1f} {line['launches']:7.0f} "
            f"{line['host'] * 1e3:6.1f} ms {line['computing'] * 1e3:7.1f} ms {line['tokens_per_second']:9,.0f}"
            + "".join(f"; unsloth {how} {value:,.0f}" for how, value in line.get("unsloth", {}).items()),
            flush=True,
        )
    of_attention = []
    for kind, tokens, length in itertools.product(ATTENTION, TOKENS[1:], (LENGTH, TOKENS[1])):
        counts = attention_of(kind, tokens, length, **rates)
        gpu = counts.seconds
        of_attention.append({"kind": kind, "tokens": tokens, "rows_of": length, "launches": counts.launches, "gpu": gpu})
        print(f"{kind}: {counts.launches} launches, {tokens} tokens in rows of {length}, {gpu * 1e3:.2f} ms", flush=True)
    claimed = [line for line in lines if "unsloth" in line]
    kept = all(line["of_block"] <= MOST[line["base"]] for line in claimed)
    ahead = all(line["tokens_per_second"] > other for line in claimed for other in line["unsloth"].values())
    content = {
        "rate_tflops": given.rate, "bandwidth_tb": given.bandwidth, "lines": lines, "attention": of_attention, "kept": kept,
        "ahead": ahead,
    }  # fmt: skip
    print(f"Written: {write_result('launches', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept and ahead else 1


if __name__ == "__main__":
    sys.exit(main())

"""Claim: a training step runs at 0.85 of the machine's rate for rows of 512 tokens and more, at 0.6 for rows of 128.

    python benchmarks/roofline.py [--quick] [--bases dense nf4 gptq] [--lengths 128 512 2048] [--steps 5] [--whole]
    python benchmarks/roofline.py --model meta-llama/Llama-3.2-1B --lengths 512 2048 --bases dense nf4

The rate is that of the fastest plain matrix product on this machine in the same dtype, measured in the same process after each
step, and compared with that step alone. Achieved is FLOPs / seconds, phase by phase, the median over the steps. The FLOPs are
those of the products and of the attention that run (contenders/timed_step): norms, activations, dequantisation, scores that the
flash kernel masks, the optimizer and every wait count as lost. SmolLM2-135M's shape, or --model's, with random weights, rank 8 on
all linear layers. Rows have one length, or between half and one and a half times that length, packed (a row of 2,048 is a whole
step). Packed rows are measured over dense weights alone, unless --whole is given: packing concerns attention, and storage formats
do not. Micro-batches have as many tokens as a run file's default (2,048); --micro-tokens gives others, such as the quickstart's
1,024. First it prints the rate of plain products in bf16 and in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from contenders.timed_step import rate
from harness.machine import origin, warn_if_busy, write_result
from harness.processes import answered
from plan_accuracy import gptq, published_shape

from lorakeet.core.precision import fastest_products
from lorakeet.models.text.from_config import published_configs
from lorakeet.train.spec import TrainSpec

SHAPE = "HuggingFaceTB/SmolLM2-135M"
LENGTHS, LEARNT, BASES = (128, 512, 2048), ("all", "completion", "label"), ("dense", "nf4", "gptq")
ASKED = {128: 0.6, 512: 0.85, 2048: 0.85}
TOKENS = 2048  # of a step
SPREAD = (0.5, 1.5, 0.75, 1.25)  # of the length: successive rows of a packed step


def cases(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every combination that differs from others, but packed rows over packed weights; with --quick one layout, label only."""
    for base in given.bases:
        for length in given.lengths:
            for learnt in ("label",) if given.quick else LEARNT:
                yield {"base": base, "length": length, "learnt": learnt, "layout": "equal"}
                if not given.quick and length < TOKENS and (given.whole or base == "dense"):
                    yield {"base": base, "length": length, "learnt": learnt, "layout": "packed"}


def asked_of(
    case: Mapping[str, Any], steps: int, products: str, model: str = SHAPE, micro_tokens: int = TrainSpec.micro_tokens
) -> dict[str, Any]:
    """The request to the process."""
    count = max(1, TOKENS // case["length"])
    equal = case["layout"] == "equal"
    lengths = [round(case["length"] * (1 if equal else SPREAD[number % len(SPREAD)])) for number in range(count)]
    settings = {
        "model.dtype": "bfloat16", "model.products": products,
        "model.quantize.method": "nf4" if case["base"] == "nf4" else "none",
        "data.max_tokens": max(lengths), "train.micro_tokens": micro_tokens, "train.batch_size": count, "lora.rank": 8,
    }  # fmt: skip
    shape = gptq(model) if case["base"] == "gptq" else published_shape(model)
    texts = {key: str(value) for key, value in settings.items()}
    return {"settings": texts, "shape": shape, "lengths": lengths, "learnt": case["learnt"], "steps": steps}


def shares(found: Mapping[str, Any]) -> dict[str, float]:
    """Achieved over possible: of the forward pass, of the backward pass, and of the whole step, medians over its repetitions."""
    seconds, flops, rates = found["seconds"], found["flops"], found["rates"]
    whole = [sum(of_step) for of_step in zip(*seconds.values(), strict=True)]
    timed = {**{phase: (flops[phase], seconds[phase]) for phase in flops}, "step": (sum(flops.values()), whole)}
    return {
        name: statistics.median(count / spent / rate for spent, rate in zip(times, rates, strict=True))
        for name, (count, times) in timed.items()
    }


def block_weights(shape: Mapping[str, Any]) -> int:
    """In the matrices of all blocks of a Llama of this shape."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * (heads + shape["num_key_value_heads"])
    return int(shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="rows of one length, the label as the only target")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--whole", action="store_true", help="packed rows over every base")
    parser.add_argument("--model", default=SHAPE, choices=sorted(published_configs()), help="whose shape it is")
    parser.add_argument("--micro-tokens", type=int, default=TrainSpec.micro_tokens, help="tokens that pass at once")
    parser.add_argument("--steps", type=int, default=5, help="timed in each process, after two that are not")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    products = str(fastest_products(torch.bfloat16)).removeprefix("torch.")
    fastest = {str(dtype).removeprefix("torch."): rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(", ".join(f"plain products in {name} {found / 1e9:.0f} GFLOP/s" for name, found in fastest.items()))
    lines = []
    print("base   tokens targets    layout   forward backward   step needed  tokens/s  GFLOP/s")
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        for case in cases(given):
            asking = asked_of(case, given.steps, products, given.model, given.micro_tokens)
            found = answered("contenders.timed_step", asking, Path(folder))
            share, asked = shares(found), ASKED[case["length"]]
            speed = found["tokens"] / sum(statistics.median(values) for values in found["seconds"].values())
            lines.append({**case, "shares": share, "asked": asked, "tokens_per_second": speed, **found})
            print(
                f"{case['base']:6} {case['length']:6} {case['learnt']:10} {case['layout']:7} {share['forward']:8.2f} "
                f"{share['backward']:8.2f} {share['step']:6.2f} {asked:6.2f} {speed:9.0f} {found['rate'] / 1e9:8.0f}",
                flush=True,
            )
    kept = all(line["shares"]["step"] >= line["asked"] for line in lines)
    content = {"products": products, "tokens_a_step": TOKENS, "micro_tokens": given.micro_tokens, "lines": lines, "kept": kept}
    content["fastest_products"] = fastest
    content |= {"model": given.model, "block_weights": block_weights(published_shape(given.model))}
    other = "" if given.model == SHAPE else f"_{given.model.rpartition('/')[2].lower()}"
    other += "" if given.micro_tokens == TrainSpec.micro_tokens else f"_micro_{given.micro_tokens}"
    claim = f"roofline{other}" + ("_quick" if given.quick else "")
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

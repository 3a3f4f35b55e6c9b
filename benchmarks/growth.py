"""Claim: the time of a training step grows as its FLOPs do: with tokens, length, rank, adapters and the size of the model.

    python benchmarks/growth.py [--quick] [--only length rank adapters size] [--steps 3] [--largest 7B]

Along each axis the rest stays: SmolLM2-135M's shape, random weights in bf16, rank 8 on all linear layers, 2,048 tokens a step in
rows of 512 (of 32 where adapters share a step; 1,024 tokens where models grow), the last token the only target. Points whose
steps take long are timed fewer times (REPEATS). The law beside each point is the time of its FLOPs at the rate of the axis's
cheapest point; a point may be slower than its law by TOLERANCE. `docs/draw_speed.py` draws the result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness.machine import origin, warn_if_busy, write_result
from harness.processes import answered
from plan_accuracy import published_shape

from lorakeet.core.precision import fastest_products

BASE = "HuggingFaceTB/SmolLM2-135M"
LLAMA = "meta-llama/Llama-2-7b-hf"
LENGTH, TOKENS, RANK = 512, 2048, 8
NARROWEST = 192  # outputs of k and v, whose pairs have no higher rank
SIZE_TOKENS = 1024  # of a step, where models grow: one of 7B takes minutes
SHORT = 32  # tokens of a row where up to 64 adapters share a step
TOLERANCE = 1.25  # times the law
SIZES: dict[str, dict[str, Any]] = {  # the true shapes of SmolLM2 and Llama 2
    "135M": published_shape(BASE),
    "360M": published_shape(
        BASE, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5
    ),
    "1.7B": published_shape(
        BASE, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32
    ),
    "7B": published_shape(LLAMA),
}
AXES: dict[str, tuple[Any, ...]] = {
    "length": (256, 512, 1024, 2048, 4096, 8192),
    "rank": (1, 4, 16, 64, 256),
    "adapters": (1, 4, 16, 64),
    "size": tuple(SIZES),
}
QUICK: dict[str, tuple[Any, ...]] = {"length": (256, 512), "rank": (1, 4), "adapters": (1, 4), "size": ("135M",)}
REPEATS = {4096: (1, 2), 8192: (1, 2), "1.7B": (1, 2), "7B": (1, 1)}  # untimed and timed steps; others 2, and --steps


def asked_of(axis: str, value: Any, steps: int, products: str) -> dict[str, Any]:
    """The request to the process for one point."""
    length = {"length": value, "adapters": SHORT}.get(axis, LENGTH)
    tokens = SIZE_TOKENS if axis == "size" else TOKENS
    count = max(1, tokens // length)
    settings: dict[str, Any] = {
        "model.dtype": "bfloat16", "model.products": products, "data.max_tokens": length, "train.micro_tokens": tokens,
        "train.batch_size": count, "lora.rank": value if axis == "rank" else RANK,
    }  # fmt: skip
    if axis == "rank":
        settings["lora.rank_pattern"] = dict.fromkeys(("k_proj", "v_proj"), min(value, NARROWEST))
    shape = {**SIZES[value if axis == "size" else "135M"], "max_position_embeddings": 8192}
    texts = {key: found if isinstance(found, dict) else str(found) for key, found in settings.items()}
    asked = {"settings": texts, "shape": shape, "lengths": [length] * count}
    untimed, timed = REPEATS.get(value, (2, steps))
    found = {**asked, "learnt": "label", "untimed": untimed, "steps": min(timed, steps)}
    return {**found, **({"members": value} if axis == "adapters" else {})}


def point(value: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Microseconds and FLOPs a token, with everything that was measured."""
    seconds = sum(statistics.median(spent) for spent in found["seconds"].values())
    tokens = found["tokens"]
    return {**found, "at": value, "us": 1e6 * seconds / tokens, "flops": sum(found["flops"].values()) / tokens}


def with_law(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point with the microseconds that its FLOPs take at the rate of the point that takes the fewest of them a token."""
    cheapest = min(points, key=lambda found: float(found["flops"]))
    rate = cheapest["flops"] / cheapest["us"]
    return [{**found, "law_us": found["flops"] / rate} for found in points]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a point or two of each axis, to see whether everything runs")
    parser.add_argument("--only", nargs="+", choices=tuple(AXES), default=tuple(AXES))
    parser.add_argument("--steps", type=int, default=3, help="timed in each process, after two that are not")
    parser.add_argument("--largest", choices=tuple(SIZES), default="7B", help="model (7B: 18 GB of memory)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    products = str(fastest_products(torch.bfloat16)).removeprefix("torch.")
    found: dict[str, list[dict[str, Any]]] = {}
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        for axis in given.only:
            values = QUICK[axis] if given.quick else AXES[axis]
            if axis == "size" and not given.quick:
                values = values[: values.index(given.largest) + 1]
            asked = {value: asked_of(axis, value, given.steps, products) for value in values}
            points = [point(value, answered("contenders.timed_step", one, Path(folder))) for value, one in asked.items()]
            found[axis] = with_law(points)
            for one in found[axis]:
                print(f"{axis:9} {one['at']!s:>6} {one['us']:9.0f} us a token, law {one['law_us']:9.0f}", flush=True)
    kept = all(one["us"] <= TOLERANCE * one["law_us"] for points in found.values() for one in points)
    content = {"products": products, "tolerance": TOLERANCE, "axes": found, "kept": kept}
    claim = "growth_quick" if given.quick else "growth"
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

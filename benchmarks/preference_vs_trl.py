"""Claim: a step of DPO is at least 6 times as fast here as with TRL as documented, 3 times as at its best, in half the memory.

    python benchmarks/preference_vs_trl.py --trl-python PATH [--objective dpo|kto|orpo] [--prompts 32 256 1024] [--pairs 8]
                                           [--steps 4] [--dtype bfloat16|float32] [--quick]

Both train SmolLM2-135M on the same token ids in the same order, from the same A and B, with rank 16 on all linear layers. Prompts
are cut from drug reviews, answers have 16 to 64 tokens. TRL as documented: fp32 weights with `bf16`, gradient checkpointing, the
reference in every step. At its best: bf16 weights, the reference computed before, no checkpointing. A pair's tokens are those of
both rows; padding never counts, and a prompt that is computed once counts twice for all. The first step is not counted.

The claim is of DPO. KTO has one answer of each pair, and that of the pair before for its KL. ORPO has no reference,
and TRL's loss of the chosen answer leaves the prompt out here, as Lorakeet's does. For these two the losses must agree; the speed
is measured, and nothing is claimed. In float32 both compute in it throughout, which is the comparison of the losses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import answered, run

RANK, ALPHA, BETA, RATE = 16, 32.0, 0.1, 1e-4
NEAR = {"bfloat16": 0.1, "float32": 1e-3}  # by which a step's losses may differ
DOCUMENTED, BEST, WANTED_MEMORY = 6.0, 3.0, 0.5
CONTENDERS = ("lorakeet", "TRL as documented", "TRL at its best")


def measured(name: str, workload: Mapping[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """One contender's steps in a fresh process."""
    if name == "lorakeet":
        return answered("contenders.preferences_lorakeet", workload, folder)
    given, result = folder / "asked.json", folder / "found.json"
    asked = {**workload, "best": name == "TRL at its best"}
    given.write_text(json.dumps(asked), encoding="utf-8")
    run([python, "-m", "contenders.preferences_trl", str(given), str(result)], log=folder / "log.txt")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl-python", required=True, help="the Python of an environment that has trl")
    parser.add_argument("--objective", choices=["dpo", "kto", "orpo"], default="dpo")
    parser.add_argument("--dtype", choices=sorted(NEAR), default="bfloat16", help="of products, here and in TRL")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256, 1024], help="tokens of the prompts")
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="of each run, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two steps of two pairs, to see whether everything runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    pairs, steps = (2, 2) if given.quick else (given.pairs, given.steps)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    lines, kept = [], True
    for prompt in given.prompts[:1] if given.quick else given.prompts:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for number in range(given.rounds):
            with TemporaryDirectory(prefix="lorakeet-bench-") as name:
                folder = Path(name)
                settings = {"rank": RANK, "alpha": ALPHA, "beta": BETA, "learning_rate": RATE, "objective": given.objective}
                asked = {**settings, "prompt": prompt, "pairs": pairs, "steps": steps, "seed": given.seed + number}
                asked["adapter"] = str(folder / "first")
                workload = {**asked, **answered("contenders.preferences_workload", asked, folder), "dtype": given.dtype}
                if given.objective == "kto":
                    workload["steps"] = [rated(step) for step in workload["steps"]]
                for contender in CONTENDERS[number % 3 :] + CONTENDERS[: number % 3]:
                    runs[contender].append(measured(contender, workload, given.trl_python, folder))
                    print(f"prompts of {prompt}: {contender} done", file=sys.stderr)
        lines.append(line(prompt, runs))
        if (given.objective, given.dtype) != ("dpo", "bfloat16"):
            lines[-1]["kept"] = lines[-1]["largest_loss_difference"] <= NEAR[given.dtype]
        kept = kept and lines[-1]["kept"]
        show(lines[-1])
    content = {"pairs": pairs, "steps": steps, "rounds": given.rounds, "lines": lines, "kept": kept}
    content |= {"objective": given.objective, "dtype": given.dtype}
    parts = [given.objective] * (given.objective != "dpo") + [given.dtype] * (given.dtype != "bfloat16") + ["quick"] * given.quick
    claim = "_".join(["preference_vs_trl", *parts])
    print(f"Written: {write_result(claim, content, seed=given.seed, about=about, folder=given.results)}")
    return 0 if kept else 1


def rated(step: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """KTO's rows of a step of pairs: one answer of each, and as its other one that of the row before, in a circle."""
    rows = [
        {"prompt_ids": pair["prompt_ids"], "chosen_ids": pair["chosen_ids" if wanted else "rejected_ids"], "wanted": wanted}
        for pair, wanted in zip(step, cycle([True, False]))
    ]
    return [{**row, "rejected_ids": before["chosen_ids"]} for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True)]


def line(prompt: int, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The medians of one length of prompts, the ratios within each round, and whether the claim holds."""
    ours = runs["lorakeet"]
    tokens = [sum(one["tokens"][1:]) for one in ours]
    rates = {
        name: [count / sum(one["seconds"][1:]) for count, one in zip(tokens, found, strict=True)] for name, found in runs.items()
    }
    peaks = {name: max(one["peak_bytes"] for one in found) for name, found in runs.items()}
    faster = {
        name: median(mine / other for mine, other in zip(rates["lorakeet"], rates[name], strict=True)) for name in CONTENDERS[1:]
    }
    gap = max(
        abs(mine - other)
        for name in CONTENDERS[1:]
        for one, two in zip(ours, runs[name], strict=True)
        for mine, other in zip(one["losses"], two["losses"], strict=True)
    )
    memory = {name: peaks["lorakeet"] / peaks[name] for name in CONTENDERS[1:]}
    kept = faster[CONTENDERS[1]] >= DOCUMENTED and faster[CONTENDERS[2]] >= BEST and max(memory.values()) <= WANTED_MEMORY
    return {
        "prompt": prompt, "tokens_per_second": {name: median(found) for name, found in rates.items()}, "faster": faster,
        "peak_bytes": peaks, "memory": memory, "largest_loss_difference": gap, "kept": kept, "runs": runs,
        "computed_of_a_step": ours[0]["computed"], "tokens_of_a_step": ours[0]["tokens"][0],
    }  # fmt: skip


def show(found: Mapping[str, Any]) -> None:
    """Prints the line of one length of prompts."""
    of_all = f"{found['computed_of_a_step']:,} of a step's {found['tokens_of_a_step']:,} are computed here"
    print(f"\nprompts of {found['prompt']} tokens: {of_all}")
    for name in CONTENDERS:
        rate, peak = found["tokens_per_second"][name], found["peak_bytes"][name] / 1e9
        ratio = ""
        if name != "lorakeet":
            ratio = f"   {found['faster'][name]:.1f} times as fast here, {found['memory'][name]:.2f} of the memory"
        print(f"  {name:18} {rate:8.0f} tokens/s {peak:6.2f} GB{ratio}")
    print(f"  largest difference of a step's loss: {found['largest_loss_difference']:.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Claim: on a GPU, training over packed rows is faster than with TRL + PEFT and unsloth, in less memory, and learns the same.

    python benchmarks/gpu_training.py [--models 1B 8B] [--bases none nf4] [--tokens 2048 4096] [--unsloth-python PATH]
    python benchmarks/gpu_training.py --quick [--unsloth-python PATH]

**Never run on a GPU: none was available.** Without a CUDA device it says so and ends with exit code 2, except with --quick: that
trains two blocks of a small model for four steps on the CPU, to show that everything runs; ignore its times.

Models in the true shapes of Llama-3.2-1B and Llama-3.1-8B with random bf16 weights, frozen as they are or in NF4 with double
quantisation; LoRA of rank 16 on all linear layers; AdamW, constant rate. A step is one pack of four rows, exactly 2,048 or 4,096
tokens, all of them targets. All contenders get the same rows in the same order and the same A and B. TRL computes a pack
padding-free (its rows flat) if flash-attn is installed, with gradient checkpointing as is its default, and without. Otherwise it
pads, which costs half more here, and the table says so. The same holds for unsloth, which decides itself. Both need bitsandbytes
for NF4, over which TRL has A and B in bf16.

Every run is a fresh process; contenders alternate, and the first one rotates from round to round. The table has tokens/s, the
peak of the GPU memory allocated while training, the share of the GPU's fastest plain bf16 product, measured before each case, and
the distance of losses from those of TRL. FLOPs are those that training needs, even if a contender computes more: twice the frozen
weights forward and twice for dX, the head the same, six times the pairs, attention's scores under the causal mask; recomputation
does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness.machine import origin, warn_if_busy, write_result
from harness.processes import Failed, rotated, run, run_module, summary
from harness.steps import largest_difference
from harness.workload import Workload, read_workload
from plan_accuracy import published_shape
from roofline import block_weights

MODELS = {"1B": "meta-llama/Llama-3.2-1B", "8B": "meta-llama/Llama-3.1-8B"}
QUICK_MODEL, QUICK_LAYERS, QUICK_TOKENS = "HuggingFaceTB/SmolLM2-135M", 2, 128
CONTENDERS = {  # in the table's order: module, options, whether it has an environment of its own
    "lorakeet": ("packed_lorakeet", (), False),
    "trl": ("packed_trl", (), False),
    "trl-keeping": ("packed_trl", ("--way", "keeping"), False),
    "unsloth": ("packed_unsloth", (), True),
}
OURS, LIKE, PEERS = "lorakeet", "trl", ("trl", "trl-keeping", "unsloth")
CLOSE = 0.05  # nats, in bf16; seen in four steps of the quick run on a CPU: 0.0003

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One model, kept one way, in packs of so many tokens."""

    model: str
    base: str
    tokens: int
    layers: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model.rpartition('/')[2]} {self.base} {self.tokens}"


def flops(shape: Mapping[str, Any], workload: Workload) -> int:
    """Of one step, as far as training needs them."""
    hidden, heads, kv = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head, layers, inner = shape.get("head_dim") or hidden // heads, shape["num_hidden_layers"], shape["intermediate_size"]
    lengths = [len(row.ids) for row in workload.steps[0]]
    tokens, learnt = sum(lengths), sum(len(row.targets) for row in workload.steps[0])
    sides = 2 * (hidden + heads * head) + 2 * (hidden + kv * head) + 3 * (hidden + inner)  # of the seven matrices of a block
    frozen = 4 * (tokens * block_weights(shape) + learnt * shape["vocab_size"] * hidden)
    pairs = 6 * tokens * layers * workload.rank * sides
    scores = sum(length * (length + 1) // 2 for length in lengths)
    return int(frozen + pairs + 12 * scores * heads * head * layers)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _given(arguments)
    gpu = torch.cuda.is_available()
    if not gpu and not given.quick:
        print("Nothing was measured: torch sees no CUDA device here. This benchmark needs a GPU.", file=sys.stderr)
        return 2
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    if given.quick:
        cases = [Case(QUICK_MODEL, base, QUICK_TOKENS, QUICK_LAYERS) for base in given.bases]
    else:
        cases = [Case(MODELS[model], base, tokens) for model in given.models for base in given.bases for tokens in given.tokens]
    measured = []
    with TemporaryDirectory(prefix="lorakeet-bench-", dir=given.scratch) as folder:
        for case in cases:  # those of one model follow each other and share its files
            measured.append(measure(case, Path(folder), given, gpu=gpu))
            show(case, measured[-1])
            print(flush=True)
    missed = [sentence for found in measured for sentence in _missed(found, quick=given.quick)]
    print("\n".join(missed))
    content = {"card": measured[0]["card"], "cases": measured, "missed": missed}
    claim = "gpu_training_quick" if given.quick else "gpu_training"
    print(f"Written: {write_result(claim, content, seed=given.seed, about=about, folder=given.results)}")
    return 1 if missed else 0


def _missed(found: Mapping[str, Any], *, quick: bool) -> list[str]:
    """What is claimed of a case and was not measured so, in words; of a quick one, that losses agree."""
    rows, name = found["contenders"], f"{found['model']} {found['base']} {found['tokens']}"
    said = [f"{name}: {each} learns otherwise than {LIKE}." for each, row in rows.items() if row["agrees"] is False]
    said += [f"{name}: {each} did not run." for each in (OURS, LIKE) if each not in rows]
    if quick or OURS not in rows:
        return said
    said += [f"{name}: {each} did not run." for each in PEERS if each not in rows and each != LIKE]
    for each in (peer for peer in PEERS if peer in rows):
        if rows[each]["lorakeet_over_it"]["median"] < 1:
            said.append(f"{name}: {each} is faster.")
        if rows[each]["peak_bytes"] < rows[OURS]["peak_bytes"]:
            said.append(f"{name}: {each} holds less memory.")
    return said


def _given(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bases", nargs="+", choices=("none", "nf4"), default=["none", "nf4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096], help="of a pack: multiples of 16")
    parser.add_argument("--steps", type=int, help="of each run (20)")
    parser.add_argument("--skip", type=int, help="first steps of each run that are not counted (5)")
    parser.add_argument("--rounds", type=int, help="runs of each contender (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two blocks of a small model, four steps; on a CPU too")
    parser.add_argument("--contenders", help="which, separated by commas (all)", default=",".join(CONTENDERS))
    parser.add_argument("--unsloth-python", type=Path, help="the Python of an environment that has unsloth")
    parser.add_argument("--scratch", type=Path, help="where models are written: 18 GB for 8B (the system's folder)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    for name, value, quick in (("steps", 20, 4), ("skip", 5, 1), ("rounds", 3, 1)):
        if getattr(given, name) is None:
            setattr(given, name, quick if given.quick else value)
    if given.skip >= given.steps:
        raise SystemExit(f"--skip {given.skip} leaves none of {given.steps} steps to count; give more --steps.")
    if unknown := set(given.contenders.split(",")) - set(CONTENDERS):
        raise SystemExit(f"There is no contender '{min(unknown)}'; there are {', '.join(CONTENDERS)}.")
    if bad := [tokens for tokens in given.tokens if tokens < 16 or tokens % 16]:
        raise SystemExit(f"--tokens {bad[0]} is no multiple of 16.")
    return given


def measure(case: Case, folder: Path, given: argparse.Namespace, *, gpu: bool) -> dict[str, Any]:
    """Every run of every contender of one case."""
    home = folder / case.model.rpartition("/")[2]
    home.mkdir(exist_ok=True)
    workload = home / "workload.json"
    options = [str(workload), "--model", case.model, "--base", case.base, "--tokens", str(case.tokens)]
    options += ["--steps", str(given.steps), "--seed", str(given.seed), "--device", "cuda" if gpu else "cpu"]
    options += [] if case.layers is None else ["--layers", str(case.layers)]
    run_module(sys.executable, "contenders.packed_workload", options, log=home / "workload.log", gpu=gpu)
    about = json.loads((home / "about.json").read_text(encoding="utf-8"))
    runs: dict[str, list[Run]] = {}
    missing: dict[str, str] = {}
    for number in range(given.rounds):
        for name in rotated(given.contenders.split(","), number):
            if name in missing:
                continue
            print(f"{case.name}: round {number + 1} of {given.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                found = _one(name, workload, given.unsloth_python, gpu=gpu)
            except (Failed, NotHere, OSError) as why:  # such as no memory left on the GPU, or no bitsandbytes: printed
                missing[name] = str(why).strip().splitlines()[-1]
            else:
                runs.setdefault(name, []).append(found)
    shape = published_shape(case.model, **({} if case.layers is None else {"num_hidden_layers": case.layers}))
    read = read_workload(workload)
    rows = _rows(runs, read, flops(shape, read), about["rate"], given.skip)
    return {**vars(case), **about, "contenders": rows, "not_run": missing}


class NotHere(Exception):
    """What a contender needs and this machine lacks."""


def _one(name: str, workload: Path, unsloth: Path | None, *, gpu: bool) -> Run:
    module, more, own_python = CONTENDERS[name]
    if own_python and unsloth is None:
        raise NotHere("not run: no --unsloth-python was given (unsloth pins other releases and needs an environment of its own)")
    python = str(unsloth) if own_python else sys.executable
    if own_python:
        run([python, "-c", "import unsloth"], log=workload.with_name(f"{name}.import.log"), gpu=gpu)
    result = workload.with_name(f"{name}.json")
    options = [str(workload), str(result), "--dtype", "bfloat16", *more]
    run_module(python, f"contenders.{module}", options, log=workload.with_name(f"{name}.log"), gpu=gpu)
    found: Run = json.loads(result.read_text(encoding="utf-8"))
    return found


def _rows(runs: Mapping[str, list[Run]], workload: Workload, needed: int, rate: float, skip: int) -> dict[str, Any]:
    """The numbers of the table, and each run as it was measured."""
    found = {}
    for name, each_round in runs.items():
        seconds = [statistics.median(each["seconds"][skip:]) for each in each_round]
        far = largest_difference(each_round, runs.get(LIKE))
        found[name] = {
            "tokens_per_second": summary(workload.tokens[0] / one for one in seconds).to_mapping(),
            "seconds_a_step": summary(seconds).to_mapping(),
            "share_of_rate": needed / statistics.median(seconds) / rate,
            "peak_bytes": max(each.get("card_peak_bytes", each["peak_bytes"]) for each in each_round),
            "lorakeet_over_it": _over(runs, name, skip),
            "largest_loss_difference": far, "agrees": None if far is None else far <= CLOSE,
            "packages": each_round[0]["packages"], "notes": each_round[0]["notes"], "runs": list(each_round),
        }  # fmt: skip
    return found


def _over(runs: Mapping[str, list[Run]], name: str, skip: int) -> dict[str, object] | None:
    """How many times as fast Lorakeet was in the same round."""
    if name == OURS or OURS not in runs:
        return None
    ours, theirs = ([statistics.median(each["seconds"][skip:]) for each in runs[which]] for which in (OURS, name))
    return summary(it / our for it, our in zip(theirs, ours, strict=False)).to_mapping()


def show(case: Case, found: Mapping[str, Any]) -> None:
    print(f"\n{case.name}: {found['card'] or 'this CPU'}, {found['rate'] / 1e12:.2f} TFLOP/s in bf16")
    columns = f"{'':16} {'tokens/s':>9} {'peak GB':>8} {'share':>6}  {'lorakeet / it':20} {'rows lie':8}"
    print(f"{columns} largest loss gap from {LIKE}")
    for name, row in found["contenders"].items():
        ratio, far = row["lorakeet_over_it"], row["largest_loss_difference"]
        pair = "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        print(
            f"{name:16} {row['tokens_per_second']['median']:9.0f} {row['peak_bytes'] / 1e9:8.2f} {row['share_of_rate']:6.2f}  "
            f"{pair:20} {row['notes']['rows lie']:8} {'' if far is None else f'{far:.4f}'}"
            f"{' DOES NOT AGREE' if row['agrees'] is False else ''}"
        )
    for name, why in found["not_run"].items():
        print(f"{name:16} {why}")


if __name__ == "__main__":
    sys.exit(main())

"""Claim: the quickstart's training is faster here than with TRL + PEFT, unsloth and PEFT by hand, and learns the same.

    python benchmarks/finetune_vs_peft.py [--unsloth-python PATH] [--steps 12] [--rounds 3] [--shuffled] [--instructed] [--quick]
    python benchmarks/finetune_vs_peft.py --to-loss [--unsloth-python PATH] [--steps 40] [--rounds 1] [--instructed] [--quick]

A step has rows of similar length, as Lorakeet orders them. With --shuffled it has rows of any length, as in the documentation of
TRL and unsloth; their batches then contain padding, which never counts as tokens. With --instructed every row starts with the
same instruction (quickstart_workload.INSTRUCTION). All contenders get the same rows in the same order, the same initial A and B,
rank, alpha, targets, learning rate and rows a step. At once TRL computes 8 of these, its default, and unsloth 2, as its notebooks
do, or all. Every run is a fresh process, one at a time. Contenders alternate, so that a slow minute of the machine affects all of
them. Every round has another seed: other rows in another order, another A.

With --to-loss every contender trains two passes over the same rows and writes its adapter now and then, outside the clock; the
states that Lorakeet with a frozen prefix caches are within it. contenders/judge evaluates all adapters on the same held-out rows.
The target is the lowest loss that every exact contender reaches. The time to it is that of all training steps until then, the
first ones included, and not that of loading the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import Failed, rotated, run, run_module, summary
from harness.steps import largest_difference
from harness.to_loss import at_target, curve, shared_target
from harness.workload import Workload, read_workload

OURS = "lorakeet"


@dataclass(frozen=True)
class Contender:
    """One way to train the workload.

    `once`: run in the first round only, for its losses, and not with --to-loss. `to_loss`: run with --to-loss alone, which holds
    rows out. `other`: how its training differs from the rest; such a contender is not exact, its losses are not compared, and it
    may never reach the target.
    """

    module: str
    dtype: str
    what: str
    own_python: bool = False
    rows_at_once: int | None = None  # of a step, for a trainer with such a setting
    once: bool = False
    to_loss: bool = False
    other: str = ""
    way: str = ""  # of the module


CONTENDERS = {
    "lorakeet": Contender("with_lorakeet", "auto", "Lorakeet as shipped, with shared prefixes"),
    "lorakeet-unshared": Contender("with_lorakeet", "auto", "Lorakeet without shared prefixes", way="unshared"),
    "lorakeet-top8": Contender(
        "with_lorakeet", "auto", "Lorakeet, adapters in the top 8 layers alone",
        other="a quarter of the parameters", way="top8",
    ),
    "lorakeet-forward": Contender(
        "with_lorakeet_forward", "auto", "Lorakeet with Fast Forward",
        other="repeats some steps while the loss on 32 more rows falls (arXiv 2409.04206)", to_loss=True,
    ),
    "lorakeet-int8": Contender(
        "with_lorakeet", "auto", "Lorakeet with int8 products",
        other="frozen weights and inputs rounded to int8", way="int8",
    ),
    "trl-fp32": Contender("with_trl", "float32", "TRL SFTTrainer + PEFT, bf16=False, 8 rows at once", rows_at_once=8),
    "trl-bf16": Contender("with_trl", "bfloat16", "TRL SFTTrainer + PEFT, bf16=True (default), 8 rows at once", rows_at_once=8),
    "unsloth": Contender("with_unsloth", "auto", "unsloth as documented, 2 rows at once", own_python=True, rows_at_once=2),
    "unsloth-16": Contender("with_unsloth", "auto", "unsloth, all rows of a step at once", own_python=True),
    "peft-manual-fp32": Contender("with_peft", "float32", "PEFT by hand, fp32"),
    "peft-manual-bf16": Contender("with_peft", "bfloat16", "PEFT by hand, bf16"),
    "lorakeet-fp32": Contender("with_lorakeet", "float32", "Lorakeet, weights and products in fp32", once=True),
    "lorakeet-bf16": Contender("with_lorakeet", "bfloat16", "Lorakeet, weights and products in bf16", once=True),
}  # fmt: skip
# With --to-loss: steps between two saved adapters, and the held-out rows that evaluate them.
SAVE_EVERY, JUDGED_ROWS, ROWS_A_STEP = 4, 60, 16
# What is claimed with --shuffled: tokens/s over those of each, memory at most; and with --to-loss each one's seconds over ours.
FASTER = {"trl-fp32": 8.0, "trl-bf16": 5.0, "unsloth": 4.0, "unsloth-16": 4.0, "peft-manual-fp32": 2.0, "peft-manual-bf16": 2.0}
LESS_MEMORY = {"unsloth": 0.8, "unsloth-16": 0.8}
SOONER = {"trl-fp32": 15.0, "unsloth": 3.0, "unsloth-16": 3.0, "peft-manual-fp32": 3.0, "peft-manual-bf16": 3.0}
QUICK_STEPS, QUICK_BATCH, QUICK_JUDGED = 4, 4, 6
# Losses are compared with those of PEFT by hand in the same products, step by step, in nats. Where weights and products are
# fp32, only the order of additions differs (seen: 4e-5 in 12 steps); bf16 rounds a loss of 8 by hundredths (seen: 0.05).
LIKE = {"float32": "peft-manual-fp32", "bfloat16": "peft-manual-bf16"}
FP32_TOLERANCE, BF16_TOLERANCE = 2e-3, 0.15

Run = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    given = _given(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        workloads = [_workload(given, Path(folder), number) for number in range(given.rounds)]
        runs, missing = _all_rounds(given, workloads)
        content = _content(given, read_workload(workloads[0]), runs, missing)
    _show(content)
    if given.to_loss:
        content["to_loss"] = _to_loss(runs)
        _show_to_loss(content["to_loss"])
    content["missed"] = [] if given.quick else _missed(content)
    print("\n".join(content["missed"]))
    kinds = [name for name in ("to_loss", "shuffled", "instructed", "quick") if getattr(given, name)]
    written = write_result("_".join(["finetune_vs_peft", *kinds]), content, seed=given.seed, about=about, folder=given.results)
    print(f"\nWritten: {written}")
    return 0 if content["losses_agree"] and not content["missed"] else 1


def _workload(given: argparse.Namespace, folder: Path, number: int) -> Path:
    """What a round trains on: its own rows, from its own seed."""
    path = folder / f"round-{number}" / "workload.json"
    path.parent.mkdir()
    options = [str(path), "--steps", str(given.steps), "--seed", str(given.seed + number), *_workload_options(given)]
    run_module(sys.executable, "contenders.quickstart_workload", options, log=path.with_suffix(".log"))
    return path


def _missed(content: Mapping[str, Any]) -> list[str]:
    """What is claimed and was not measured so, in words; with rows of alike length nothing is."""
    if not content["settings"]["shuffled"]:
        return []
    found, ours = [f"{name} {why}." for name, why in content["not_run"].items()], content["contenders"].get(OURS)
    if ours is None:
        return [*found, f"{OURS} did not run, with whom all are compared."]
    for name, row in content["contenders"].items():
        faster, less, ratio = FASTER.get(name, 0.0), LESS_MEMORY.get(name), row["lorakeet_over_it"]
        if ratio is not None and ratio["median"] < faster:
            found.append(f"{faster:g} times the tokens/s of {name} is claimed; it is {ratio['median']:.2f}.")
        if less is not None and ours["peak_bytes"]["median"] > less * row["peak_bytes"]["median"]:
            share = ours["peak_bytes"]["median"] / row["peak_bytes"]["median"]
            found.append(f"{less:g} of the memory of {name} is claimed; it is {share:.2f}.")
    for name, row in content.get("to_loss", {}).get("contenders", {}).items():
        took = row["over_lorakeet"]
        if took is not None and took["median"] < SOONER.get(name, 0.0):
            found.append(f"{SOONER[name]:g} times as soon as {name} at the same loss is claimed; it is {took['median']:.2f}.")
    return found


def _given(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (12; with --to-loss 40)")
    parser.add_argument("--skip", type=int, help="first steps of each run that are not counted in tokens/s (2)")
    parser.add_argument("--rounds", type=int, help="runs of each contender (3; with --to-loss 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffled", action="store_true", help="rows of any length in a step, as peers take them")
    parser.add_argument("--instructed", action="store_true", help="every row begins with the same instruction of 100 tokens")
    parser.add_argument("--to-loss", action="store_true", help="the time to the same held-out loss too")
    parser.add_argument("--quick", action="store_true", help="four steps of four rows, to see whether everything runs")
    parser.add_argument("--unsloth-python", type=Path, help="the Python of an environment that has unsloth")
    parser.add_argument("--contenders", help="which, separated by commas (all that --to-loss, or its absence, allows)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    named = [name for name, each in CONTENDERS.items() if not (each.once if given.to_loss else each.to_loss)]
    usual = {
        "steps": QUICK_STEPS if given.quick else 40 if given.to_loss else 12,
        "skip": 1 if given.quick else 2,
        "rounds": 1 if given.quick or given.to_loss else 3,
        "contenders": ",".join(named),
    }
    for name, value in usual.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.skip >= given.steps:
        raise SystemExit(f"--skip {given.skip} leaves none of {given.steps} steps to count; give more --steps.")
    return given


def _workload_options(given: argparse.Namespace) -> list[str]:
    """The arguments of contenders.quickstart_workload, besides steps and seed."""
    found = [f"--{name}" for name in ("shuffled", "instructed") if getattr(given, name)]
    if given.quick:
        found += ["--batch-size", str(QUICK_BATCH)]
    if given.to_loss:
        quick = (given.steps * QUICK_BATCH // 2, QUICK_STEPS // 2, QUICK_JUDGED)
        rows, every, judged = quick if given.quick else (given.steps * ROWS_A_STEP // 2, SAVE_EVERY, JUDGED_ROWS)
        found += ["--training-rows", str(rows), "--save-every", str(every), "--judged-rows", str(judged)]
    return found


def _all_rounds(given: argparse.Namespace, workloads: Sequence[Path]) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Every run of every contender, and of those that did not run, why."""
    missing: dict[str, str] = {}
    pythons: dict[str, str] = {}
    for name in given.contenders.split(","):
        if name not in CONTENDERS:
            raise SystemExit(f"There is no contender '{name}'; there are {', '.join(CONTENDERS)}.")
        python = given.unsloth_python if CONTENDERS[name].own_python else Path(sys.executable)
        why = _cannot_run(name, python, workloads[0].parent)
        if why:
            missing[name] = why
        else:
            pythons[name] = str(python)
    if not pythons:
        raise SystemExit("\n".join(f"{name}: {why}" for name, why in missing.items()))
    runs: dict[str, list[Run]] = {name: [] for name in pythons}
    for number, workload in enumerate(workloads):
        for name in rotated(list(pythons), number):
            if number and CONTENDERS[name].once:
                continue
            print(f"round {number + 1} of {given.rounds}: {name}", file=sys.stderr, flush=True)
            runs[name].append(_one(name, pythons[name], workload))
    return runs, missing


def _cannot_run(name: str, python: Path | None, folder: Path) -> str:
    """Why a contender cannot run here; empty when it can."""
    if python is None:
        return "not run: no --unsloth-python was given (unsloth pins other releases and needs an environment of its own)"
    package = {"with_trl": "trl", "with_unsloth": "unsloth", "with_peft": "peft"}.get(CONTENDERS[name].module)
    if package is None:
        return ""
    try:
        run([str(python), "-c", f"import {package}"], log=folder / f"{name}.import.log")
    except (Failed, OSError) as error:
        return f"not run: {package} cannot be imported by {python.name} ({str(error).splitlines()[-1]})"
    return ""


def _one(name: str, python: str, workload: Path) -> Run:
    result, contender = workload.with_name(f"{name}.json"), CONTENDERS[name]
    options = [str(workload), str(result), "--dtype", contender.dtype]
    options += ["--way", contender.way] if contender.way else []
    options += [] if contender.rows_at_once is None else ["--rows-at-once", str(contender.rows_at_once)]
    run_module(python, f"contenders.{contender.module}", options, log=workload.with_name(f"{name}.log"))
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    found["tokens"] = read_workload(workload).tokens
    saved, answer = result.with_suffix(""), workload.with_name("judged.json")
    if saved.exists():  # adapters, after some steps
        options = [str(workload), str(answer), str(saved)]
        run_module(sys.executable, "contenders.judge", options, log=workload.with_name("judge.log"))
        judged = found["held_out_losses"] = json.loads(answer.read_text(encoding="utf-8"))
        rmtree(saved)
        print(f"  held-out loss {' '.join(f'{loss:.4f}' for loss in judged.values())}", file=sys.stderr, flush=True)
    return found


def _content(
    given: argparse.Namespace, workload: Workload, runs: Mapping[str, list[Run]], missing: Mapping[str, str]
) -> dict[str, Any]:
    """The numbers of the table, and each run as it was measured."""
    skip = given.skip
    speeds = {
        name: [sum(each["tokens"][skip:]) / sum(each["seconds"][skip:]) for each in found] for name, found in runs.items()
    }
    losses = {name: found[0]["losses"] for name, found in runs.items()}
    pairs = {
        name: summary(ours / theirs for ours, theirs in zip(speeds[OURS], speeds[name], strict=False))  # `once` ran in round 1
        for name in runs
        if OURS in runs and name != OURS
    }
    notes = {name: found[0]["notes"] for name, found in runs.items()}
    likes = {name: LIKE[str(note["products"])] for name, note in notes.items()}
    far = {
        name: None if CONTENDERS[name].other else largest_difference(runs[name], runs.get(like)) for name, like in likes.items()
    }
    allowed = {
        name: FP32_TOLERANCE if note["weights"] == note["products"] == "float32" else BF16_TOLERANCE
        for name, note in notes.items()
    }
    return {
        "settings": {
            "steps": given.steps, "not_counted": given.skip, "rounds": given.rounds,
            "rank": workload.rank, "alpha": workload.alpha,
            "targets": workload.target_modules, "learning_rate": workload.learning_rate, "rows_a_step": workload.batch_size,
            "tokens_a_step": workload.tokens, "shuffled": workload.shuffled,
            "instructed": workload.instructed, "training_rows": workload.training_rows, "judged_rows": len(workload.held_out),
        },
        "contenders": {
            name: {
                "what": CONTENDERS[name].what, "rows_at_once": CONTENDERS[name].rows_at_once,
                "trains_otherwise": CONTENDERS[name].other,
                "tokens_per_second": summary(speeds[name]).to_mapping(),
                "seconds_a_step": summary(_seconds_a_step(each, given.skip) for each in found).to_mapping(),
                "peak_bytes": summary(each["peak_bytes"] for each in found).to_mapping(),
                "lorakeet_over_it": pairs[name].to_mapping() if name in pairs else None,
                "losses": losses[name],
                "largest_loss_difference": far[name], "allowed_loss_difference": allowed[name],
                "compared_with": likes[name],
                "threads": found[0]["threads"], "packages": found[0]["packages"], "notes": notes[name],
            }
            for name, found in runs.items()
        },
        "not_run": dict(missing),
        "losses_agree": all(value is None or value <= allowed[name] for name, value in far.items()),
        "runs": {name: list(found) for name, found in runs.items()},
    }  # fmt: skip


def _to_loss(runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    """The target, and of every contender when it was there: seconds, and how much longer that took than Lorakeet as shipped."""
    curves = {
        name: [curve(each["seconds"], each["seconds_before"], each["held_out_losses"]) for each in found]
        for name, found in runs.items()
    }
    exact = [name for name in runs if not CONTENDERS[name].other] or list(runs)
    target = shared_target([points for name in exact for points in curves[name]])
    found = {name: [at_target(points, target) for points in all_points] for name, all_points in curves.items()}
    took = {name: [each["seconds"] for each in each_round] for name, each_round in found.items()}
    reached = {name: times for name, times in took.items() if None not in times}
    ours = reached.get(OURS)
    return {
        "target": target,
        "exact": exact,
        "contenders": {
            name: {
                "seconds": summary(reached[name]).to_mapping() if name in reached else None,
                "over_lorakeet": (
                    summary(it / our for it, our in zip(reached[name], ours, strict=False)).to_mapping()  # `once` ran in round 1
                    if ours and name in reached else None
                ),
                "rounds": found[name],
            }
            for name in runs
        },
    }  # fmt: skip


def _seconds_a_step(one: Run, skip: int) -> float:
    counted = one["seconds"][skip:]
    return float(sum(counted)) / len(counted)


def _show(content: Mapping[str, Any]) -> None:
    settings, found = content["settings"], content["contenders"]
    tokens = settings["tokens_a_step"][settings["not_counted"] :]
    print(f"\n{settings['rounds']} rounds, {len(tokens)} counted steps of {sum(tokens) / len(tokens):.0f} tokens without padding")
    print(f"{'':18} {'tokens/s':>9} {'s a step':>9} {'peak GB':>8}  {'lorakeet / it: median (min-max)':32} largest loss gap")
    for name, row in found.items():
        ratio = row["lorakeet_over_it"]
        pair = "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        far = row["largest_loss_difference"]
        difference = "" if far is None else f"{far:.5f} from {row['compared_with']}"
        print(
            f"{name:18} {row['tokens_per_second']['median']:9.1f} {row['seconds_a_step']['median']:9.2f} "
            f"{row['peak_bytes']['median'] / 1e9:8.2f}  {pair:32} {difference}"
        )
    for name, why in content["not_run"].items():
        print(f"{name:18} {why}")
    print("\nloss  " + " ".join(f"{name:>17}" for name in found))
    for step in range(settings["steps"]):
        print(f"{step + 1:5} " + " ".join(f"{row['losses'][step]:17.5f}" for row in found.values()))
    verdict = "agree" if content["losses_agree"] else "DO NOT AGREE"
    print(f"\nThe losses {verdict} at every step (at most {FP32_TOLERANCE} nats apart in fp32, {BF16_TOLERANCE} with bf16).")


def _show_to_loss(found: Mapping[str, Any]) -> None:
    print(f"\nSeconds of training to a held-out loss of {found['target']:.4f}, the lowest that every exact contender reaches")
    for name, row in found["contenders"].items():
        lowest, other = min(each["lowest_loss"] for each in row["rounds"]), CONTENDERS[name].other
        took = "not reached" if row["seconds"] is None else f"{row['seconds']['median']:.1f}"
        after = "" if row["seconds"] is None else f"after {median(each['step'] for each in row['rounds']):.1f} steps"
        ratio = "" if row["over_lorakeet"] is None else f"{row['over_lorakeet']['median']:.2f} times Lorakeet's"
        print(f"{name:18} {took:>11}  {after:17} {ratio:22} lowest loss {lowest:.4f}{f' ({other})' if other else ''}")


if __name__ == "__main__":
    sys.exit(main())

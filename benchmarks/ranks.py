"""Claim: an adapter allocated or compressed to half the parameters of uniform rank 16 shows no loss against it.

    python benchmarks/ranks.py --task reviews --seeds 0,1 --arms uniform-16,allocated-8 [--together 4]
    python benchmarks/ranks.py --summary

Two real tasks, whose test rows choose nothing: sentiment of drug reviews, and the condition that a review is about (the ten most
frequent). Every arm trains on the same rows by N-adapter runs, pruned ones each in a run of its own; its best step is chosen on
held-out rows. The work is long, so it is done in parts, which are committed as they come: each (task, seed, arm) is a line of
--raw, with its flags and commit, and existing lines are not measured again. --summary, with the same flags, compares all arms
with uniform-16 on the same test rows, paired, in intervals over rows and seeds (evaluate/compare), Holm-corrected; and again each
arm at the learning rate that held-out rows prefer: an arm NAME@F has F times the rate. The loss of half the parameters is tested
without the correction, which would hide it the better the more arms there are. Accuracies and losses are no timings: a busy
machine does not change them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness.machine import commit, origin, write_result
from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.data.locate import locate_data, open_text
from lorakeet.errors import RunStopped
from lorakeet.evaluate.compare import compare_over_seeds, holm
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.kinds.text.assemble import TextAssembly, add_pairs, assemble_text, text_task
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.rank_curve import moments_of
from lorakeet.kinds.text.ranks import choose_ranks
from lorakeet.models.fits import plan_of
from lorakeet.models.inject import adapter_of, eject, trained_parameters
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import add_adapter
from lorakeet.ranks.allocate import pair_parameters
from lorakeet.ranks.prune import START_OVER_END
from lorakeet.ranks.resize import cut_to_budget
from lorakeet.ranks.resize import spectra as spectra_of
from lorakeet.ranks.spec import RanksSpec
from lorakeet.runs.pruning import pruned_plan
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.train.text.multi_adapter import Member, Progress, train_many
from lorakeet.verbs.quickstart import config_path

LINES = Path(__file__).with_name("partial") / "ranks.jsonl"
BASELINE = "uniform-16"
HALVES = ("allocated-8", "allocated-8-scaled", "compressed-8")  # half the parameters of the baseline
CUT_FROM = "uniform-64"
COMPRESSED = {"compressed-16": 16, "compressed-8": 8, "compressed-4": 4}  # from that, when it is trained
CONDITIONS, FEWEST_SEEDS = 10, 3  # fewer seeds get no interval and no verdict, nor a place in Holm's family
ARMS: dict[str, dict[str, Any]] = {
    **{f"uniform-{rank}": {"rank": rank} for rank in (2, 4, 8, 16, 32, 64)},
    "attention-16": {"rank": 16, "target_modules": ("attention",)},
    "mlp-16": {"rank": 16, "target_modules": ("mlp",)},
    "attention-equal": {"rank": 42, "target_modules": ("attention",)},  # about as many parameters as all-linear of rank 16
    "mlp-equal": {"rank": 26, "target_modules": ("mlp",)},
    "allocated-16": {"score": "gradient", "like": 16},
    "allocated-8": {"score": "gradient", "like": 8},
    "allocated-16-scaled": {"score": "gradient", "like": 16, "scaled": True},  # one scale for all: alpha grows with the rank
    "allocated-8-scaled": {"score": "gradient", "like": 8, "scaled": True},
    "activation-16": {"score": "activation", "like": 16},
    "sensitivity-16": {"score": "sensitivity", "like": 16},
    "pruned-16": {"prune": 16},  # from 1.5 times these parameters, at the scale of uniform rank 16; in runs of their own
    "pruned-8": {"prune": 8},
    "dora-16": {"rank": 16, "variant": "dora"},
    "rslora-16": {"rank": 16, "scale_rule": "alpha/sqrt(rank)"},
    "rslora-64": {"rank": 64, "scale_rule": "alpha/sqrt(rank)"},
    "pissa-16": {"rank": 16, "start": "pissa"},
    "gradient-start-16": {"rank": 16, "start": "gradient"},
    "activation-start-16": {"rank": 16, "start": "activation"},
    "loraplus-16": {"rank": 16, "b_learning_rate_ratio": 16.0},
}
RATES = {
    **dict.fromkeys((BASELINE, "uniform-64", "allocated-8", "allocated-8-scaled", "pruned-8", "dora-16"), ("0.5", "2")),
    "rslora-16": ("0.5",), "pissa-16": ("0.3",), "loraplus-16": ("0.25",),
}  # fmt: skip
DEFAULT = [*ARMS, *(f"{arm}@{factor}" for arm, factors in RATES.items() for factor in factors)]


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.summary:
        return summary(given.raw, given.results, flags_of(given))
    arms = [arm for arm in given.arms.split(",") if arm]
    if unknown := [arm for arm in arms if arm.partition("@")[0] not in ARMS]:
        raise SystemExit(f"There are no arms {', '.join(unknown)}; there are {', '.join(ARMS)}, each also as NAME@FACTOR.")
    given.raw.parent.mkdir(parents=True, exist_ok=True)
    made_by = commit()["commit"]
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        setup = assemble_text(run_of(given.task, Path(folder), given), Console(stderr=True))
        for seed in map(int, given.seeds.split(",")):
            same = records(given.raw, flags_of(given))
            done = {record["arm"] for record in same if (record["task"], record["seed"]) == (given.task, seed)}
            todo = [arm for arm in arms if arm not in done]
            for start in range(0, len(todo), given.together):
                group = todo[start : start + given.together]
                print(f"{given.task}, seed {seed}: {', '.join(group)}", file=sys.stderr, flush=True)
                for record in trained(setup, group, seed, given.task):
                    with given.raw.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**record, "flags": flags_of(given), "commit": made_by}) + "\n")
    return 0


def flags_of(given: argparse.Namespace) -> dict[str, Any]:
    """What a line must have been made with to count: a try of a few steps is none of the real runs."""
    return {name: getattr(given, name) for name in ("model", "epochs", "steps", "limit")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=("reviews", "conditions"), default="reviews")
    parser.add_argument("--arms", default=",".join(DEFAULT), help="separated by commas; compressed ones come with uniform-64")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--together", type=int, default=4, help="adapters in one pass over the base")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="fewer optimizer steps, to try the script; 12 or more with pruned arms")
    parser.add_argument("--limit", type=int, help="fewer rows of each file, to try the script")
    parser.add_argument("--model", help="another base, to try the script")
    parser.add_argument("--raw", type=Path, default=LINES, help="a line for each task, seed and arm")
    parser.add_argument("--summary", action="store_true", help="train nothing; compare what is in --raw and write the result")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    return parser


def run_of(task: str, folder: Path, given: argparse.Namespace) -> RunConfig:
    """The shipped run file at alpha 32; for `conditions`, on the rows of the most frequent ones."""
    flags = {"lora.alpha": "32", "train.epochs": str(given.epochs), "evaluate.baselines": "false", "out": str(folder / "run")}
    flags |= {f"data.{name}": str(given.limit) for name in ("limit",) if given.limit}
    flags |= {"train.steps": str(given.steps)} if given.steps else {}
    flags |= {"model": given.model} if given.model else {}
    if task == "conditions":
        shipped = read_run(config_path()).data
        kept: tuple[str, ...] = ()
        for name, file in (("train", shipped.train), ("test", str(shipped.test))):
            rows = _reviews(file)
            kept = kept or tuple(sorted(word for word, _ in Counter(r["label"] for r in rows).most_common(CONDITIONS)))
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"] in kept), encoding="utf-8")
            flags[f"data.{name}"] = str(path)
        flags |= {"data.text_column": "text", "data.label_column": "label"}
        flags["data.template"] = "Review of a drug: {text}\nIt was taken for"
    return read_run(config_path(), flags)


def _reviews(file: str) -> list[dict[str, str]]:
    """Reviews and their conditions, in which the source has cut final letters r and initial letters F."""
    with open_text(locate_data(file)) as lines:
        rows = csv.DictReader(lines, delimiter="\t")
        return [{"text": row["review"], "label": row["condition"].strip()} for row in rows if row["condition"].strip()]


def trained(setup: TextAssembly, arms: Sequence[str], seed: int, task: str) -> list[dict[str, Any]]:
    """One record for each arm, trained together, and for what is compressed from uniform-64."""
    alone = [arm for arm in arms if "prune" in ARMS[arm.partition("@")[0]]]
    names = {f"arm_{index}": arm for index, arm in enumerate(arms) if arm not in alone}
    found = [_pruned(setup, arm, seed) | {"task": task, "seed": seed} for arm in alone]  # which leave the model bare
    members = [_member(setup, name, arm, seed) for name, arm in names.items()]
    for (name, arm), at in zip(names.items(), train_many(setup.text, members) if members else [], strict=True):
        adapter = adapter_of(setup.text.model, name, base=setup.text.name)
        count = sum(parameter.numel() for parameter in trained_parameters(setup.text.model, name).values())  # PiSSA stores twice
        found.append(_record(setup, name, arm, count, _ended(at)) | {"task": task, "seed": seed})
        which, at_rate, factor = arm.partition("@")
        if which == CUT_FROM and not at.diverged:
            cut = _compressed(setup, name, adapter, at)
            found += [record | {"arm": record["arm"] + at_rate + factor, "task": task, "seed": seed} for record in cut]
        eject(setup.text.model, name)
    return found


def _member(setup: TextAssembly, name: str, arm: str, seed: int) -> Member:
    which, _, factor = arm.partition("@")
    wanted = dict(ARMS[which])
    rate = float(setup.config.train.learning_rate or 1e-3) * float(factor or 1)
    ratio = wanted.pop("b_learning_rate_ratio", 1.0)
    spec = replace(setup.config.train, learning_rate=rate, b_learning_rate_ratio=ratio, seed=seed)
    lora = _allocated(setup, seed, **wanted) if "score" in wanted else replace(setup.config.lora, **wanted)
    plan = plan_for(setup.text.model, lora, setup.text.family)
    add_pairs(replace(setup, config=replace(setup.config, lora=lora)), plan, seed=seed, name=name)
    return Member(name, spec, setup.train.examples, setup.held_out.examples)


def _allocated(setup: TextAssembly, seed: int, *, score: Any, like: int, scaled: bool = False) -> LoraSpec:
    """The ranks that --ranks auto chooses for the parameters of uniform rank `like`; measured with no adapter in use.

    `scaled`: every pair has the scale of that uniform rank; else the same alpha, as --ranks auto gives it.
    """
    lora = replace(setup.config.lora, rank=like)
    config = replace(
        setup.config, lora=lora, ranks=RanksSpec(choose="auto", score=score), train=replace(setup.config.train, seed=seed)
    )
    bare = plan_for(setup.text.model, lora, setup.text.family)
    chosen, plan = choose_ranks(config, setup.text, bare, setup.train.examples, Console(stderr=True))
    alphas = {entry.path: lora.alpha * entry.rank / like for entry in plan.entries}
    return replace(chosen.lora, alpha_pattern=alphas) if scaled else chosen.lora


def _compressed(setup: TextAssembly, name: str, adapter: Adapter, at: Progress) -> list[dict[str, Any]]:
    """The adapter on the model cut to the parameters of lower ranks, each measured."""
    text, found = setup.text, []
    plan = plan_of(text.model, adapter)
    spectra = spectra_of(adapter, moments_of(text, setup.config, setup.train.examples[:256], name), "loss")
    for arm, rank in COMPRESSED.items():
        budget = pair_parameters(replace(plan, entries=tuple(replace(entry, rank=rank) for entry in plan.entries)))
        cut = cut_to_budget(adapter, plan, spectra, budget)
        add_adapter(text, cut, "cut")
        found.append(_record(setup, "cut", arm, cut.parameters, _ended(at)))
        eject(text.model, "cut")
    return found


def _pruned(setup: TextAssembly, arm: str, seed: int) -> dict[str, Any]:
    """A run whose ranks fall to the parameters of uniform rank `prune`."""
    which, _, factor = arm.partition("@")
    like, rate = ARMS[which]["prune"], float(setup.config.train.learning_rate or 1e-3) * float(factor or 1)
    lora, text = setup.config.lora, setup.text
    budget = pair_parameters(plan_for(text.model, replace(lora, rank=like), text.family))
    first = math.ceil(like * START_OVER_END)
    config = replace(
        setup.config,
        lora=replace(lora, rank=first, alpha=lora.alpha * first / like),
        ranks=RanksSpec(choose="prune", budget=str(budget)),
        train=replace(setup.config.train, learning_rate=rate, seed=seed),
    )
    run = replace(setup, config=config, plan=plan_for(text.model, config.lora, text.family))
    task = text_task(run)
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        try:
            outcome = train(task, config.train, run=RunFolder.create(Path(folder) / "run"))
        except RunStopped as stopped:
            eject(text.model)
            return {"arm": arm, "ended": str(stopped), "diverged": True}
    left = pair_parameters(pruned_plan(text, run.plan))
    ended = {"best_step": outcome.best_step, "steps": outcome.steps, "ended": outcome.reason, "held_out_loss": outcome.best_loss}
    found = _record(setup, task.name, arm, left, ended)
    eject(text.model)
    return found


def _ended(at: Progress) -> dict[str, Any]:
    """How a member of an N-adapter run ended."""
    found = {"best_step": at.watch.best_step, "steps": at.step, "ended": at.done}
    return {**found, "diverged": True} if at.diverged else {**found, "held_out_loss": None if at.best is None else at.best.value}


def _record(setup: TextAssembly, name: str, arm: str, parameters: int, ended: Mapping[str, Any]) -> dict[str, Any]:
    """What the test rows say of the adapter `name`, row by row."""
    about = {"arm": arm, "parameters": parameters, **ended}
    if about.get("diverged"):
        return about
    judge = TextEvaluator(setup.config, setup.text, setup.encoder, setup.dataset.test, Console(quiet=True), name)
    answers = judge.answers(judge.fitting(), name)
    losses = -answers.log_probs[np.arange(len(answers.truth)), answers.truth]
    correct = "".join("1" if right else "0" for right in answers.correct)
    return {**about, "losses": [round(float(value), 4) for value in losses], "correct": correct}


def records(raw: Path, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the raw file that were made with `flags`; none where it is not there yet."""
    lines = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()] if raw.exists() else []
    return [line for line in lines if line.get("flags") == flags]


def summary(raw: Path, results: Path, flags: Mapping[str, Any]) -> int:
    """Compares every arm with the baseline over the seeds that both have; 1 where all halves lose on some task."""
    about, content, found = origin(), {}, records(raw, flags)
    for task in ("reviews", "conditions"):
        lines = [record for record in found if record["task"] == task and not record.get("diverged")]
        by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
        for record in lines:
            by_arm.setdefault(record["arm"], {})[record["seed"]] = record
        if BASELINE in by_arm:
            diverged = Counter(r["arm"] for r in found if r["task"] == task and r.get("diverged"))
            rates = _best_rates(by_arm)
            tuned = _compared({arm: by_arm[name] for arm, name in rates.items()})
            for arm, line in tuned.items():  # one rate is no choice: the baseline has three
                line["rates_tried"] = sum(name.partition("@")[0] == arm for name in by_arm)
            content[task] = {
                "arms": _compared(by_arm), "best_rates": rates, "tuned": tuned, "cut": _cut(by_arm), "diverged": dict(diverged),
            }  # fmt: skip
            _show(task, content[task])
    if not content:
        raise SystemExit(f"{raw} has no line of {BASELINE} made with {dict(flags)} yet; train it first.")
    held = {task: any(table["tuned"][arm].get("verdict_alone") not in ("worse", None) for arm in HALVES if arm in table["tuned"])
            for task, table in content.items()}  # fmt: skip
    print(f"Half the parameters of {BASELINE} without a loss shown: {held}")
    whole = {"flags": dict(flags), "tasks": content, "kept": held}
    print(f"Written: {write_result('ranks', whole, seed=0, about=about, folder=results)}")
    return 0 if all(held.values()) else 1


def _compared(by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    base, spec = by_arm[BASELINE], EvaluateSpec()
    table, comparisons = {}, {}
    for arm, runs in by_arm.items():
        seeds = sorted(set(runs) & set(base))
        if not seeds:
            continue
        accuracies = [_accuracy(runs[seed]) for seed in seeds]
        means = [statistics.fmean(runs[seed]["losses"]) for seed in seeds]
        gaps = [mean - statistics.fmean(base[seed]["losses"]) for mean, seed in zip(means, seeds, strict=True)]
        table[arm] = {
            "seeds": seeds,
            "parameters": round(statistics.fmean(runs[seed]["parameters"] for seed in seeds)),
            "accuracy": statistics.fmean(accuracies),
            "accuracy_sd_over_seeds": statistics.stdev(accuracies) if len(seeds) > 1 else None,
            "log_loss": statistics.fmean(means),
            "gap_sd_over_seeds": statistics.stdev(gaps) if len(seeds) > 1 else None,
        }
        if arm != BASELINE and len(seeds) >= FEWEST_SEEDS:
            left, right = ([_rows(of[seed], name) for seed in seeds] for of, name in ((runs, arm), (base, BASELINE)))
            comparisons[arm] = partial(compare_over_seeds, left, right)
            table[arm]["verdict_alone"] = comparisons[arm](spec).verdict  # not corrected for the number of arms
    for arm, found in zip(comparisons, holm(list(comparisons.values()), spec), strict=True):
        table[arm] |= {**_interval(found.difference), "p_holm": found.p_value}
        table[arm]["verdict"] = found.verdict
    return table


def _cut(by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What cutting costs: each compressed adapter against the one that it was cut from, seed by seed; not Holm-corrected."""
    found = {}
    whole = by_arm.get(CUT_FROM, {})
    for arm in COMPRESSED:
        runs = by_arm.get(arm, {})
        if len(seeds := sorted(set(runs) & set(whole))) >= FEWEST_SEEDS:
            gaps = [np.subtract(runs[seed]["losses"], whole[seed]["losses"]) for seed in seeds]
            ones = np.ones(len(gaps[0]), dtype=np.int64)
            cut, uncut = [RowLosses(arm, gap, ones) for gap in gaps], [RowLosses("no change", 0 * gap, ones) for gap in gaps]
            found[arm] = {"seeds": seeds, **_interval(compare_over_seeds(cut, uncut, EvaluateSpec()).difference)}
    return found


def _interval(gap: Estimate) -> dict[str, Any]:
    return {"gap": gap.value, "low": gap.low, "high": gap.high, "n": gap.n}


def _accuracy(record: Mapping[str, Any]) -> float:
    return record["correct"].count("1") / len(record["correct"])


def _rows(record: Mapping[str, Any], name: str) -> RowLosses:
    losses = np.array(record["losses"])
    return RowLosses(name, losses, np.ones(len(losses), dtype=np.int64))


def _best_rates(by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, str]:
    """By arm the one of its learning rates, NAME or NAME@F, of lowest held-out loss; of those with the most seeds that ended."""
    found: dict[str, tuple[int, float, str]] = {}
    for name, runs in by_arm.items():
        losses = [run["held_out_loss"] for run in runs.values() if run.get("held_out_loss") is not None]
        if losses:
            arm, one = name.partition("@")[0], (-len(losses), statistics.fmean(losses), name)
            found[arm] = min(found.get(arm, one), one)
    return {arm: name for arm, (_, _, name) in found.items()}


def _show(task: str, found: Mapping[str, Any]) -> None:
    print(f"\n{task}: log-loss on test rows, mean over seeds; gap to {BASELINE} with 95 % interval (rows, seeds), p by Holm")
    _print(found["arms"])
    print("The same, each arm at its own best learning rate by held-out loss:")
    _print({found["best_rates"][arm]: line for arm, line in found["tuned"].items()})
    for arm, cut in found["cut"].items():
        print(f"{arm:20} against the adapter that it was cut from: {cut['gap']:+.4f} [{cut['low']:+.4f}, {cut['high']:+.4f}]")
    for arm, count in found["diverged"].items():
        print(f"{arm:20} diverged in {count} seeds")


def _print(table: Mapping[str, Mapping[str, Any]]) -> None:
    for arm, line in sorted(table.items(), key=lambda item: item[1]["log_loss"]):
        gap = f"{line['gap']:+.4f} [{line['low']:+.4f}, {line['high']:+.4f}] p {line['p_holm']:.3g}" if "gap" in line else ""
        print(
            f"{arm:20}{line['parameters']:>12,}  accuracy {line['accuracy']:.3f}  log-loss {line['log_loss']:.4f}  "
            f"{len(line['seeds'])} seeds  {gap}  {line.get('verdict', 'baseline' if arm == BASELINE else 'too few seeds')}"
            + (f", of {line['rates_tried']} rates" if "rates_tried" in line else "")
            + (" (worse by itself)" if line.get("verdict_alone") == "worse" != line["verdict"] else "")
        )


if __name__ == "__main__":
    raise SystemExit(main())

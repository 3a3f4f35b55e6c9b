"""One process of benchmarks/int8_products.py: the shipped run over one kind of base, and what its best step answers on test rows.

    python -m contenders.int8_run RESULT [--method int8] [--products] [--steps 8] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness.steps import PACKAGES, installed, peak_bytes
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.kinds.text.assemble import assemble_text, text_task
from lorakeet.kinds.text.evaluate import ADAPTER, TextEvaluator
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.verbs.quickstart import config_path

UNTIMED = 2  # steps in which kernels are made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--method", default="none")
    parser.add_argument("--products", action="store_true", help="in int8, while training")
    parser.add_argument("--steps", type=int, default=0, help="0: as the run file says")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        flags = {
            "model.quantize.method": given.method, "model.quantize.int8_products": str(given.products).lower(),
            "train.seed": str(given.seed), "out": f"{folder}/run",
        }  # fmt: skip
        if given.steps:
            flags |= {"train.steps": str(given.steps), "train.evaluate_every": str(given.steps)}
        setup = assemble_text(read_run(config_path(), flags), Console(quiet=True))
        run = RunFolder.create(Path(folder) / "run")
        outcome = train(text_task(setup), setup.config.train, run=run)
        records = read_metrics(run.metrics)
    peak = peak_bytes()
    judge = TextEvaluator(setup.config, setup.text, setup.encoder, setup.dataset.test, Console(quiet=True))
    answers = judge.answers(judge.fitting(), ADAPTER)
    steps = [record for record in records if "loss" in record]
    found = {
        "losses": [record["loss"] for record in steps],
        "held_out": [[record["step"], record["held_out_loss"]] for record in records if "held_out_loss" in record],
        "tokens": [record["tokens"] for record in steps][UNTIMED:],
        "seconds": [record["tokens"] / record["tokens_per_second"] for record in steps][UNTIMED:],
        "best_step": outcome.best_step, "peak_bytes": peak, "threads": torch.get_num_threads(),
        "labels": list(answers.labels), "truth": answers.truth.tolist(), "log_probs": answers.log_probs.tolist(),
        "packages": installed(PACKAGES),
    }  # fmt: skip
    given.result.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

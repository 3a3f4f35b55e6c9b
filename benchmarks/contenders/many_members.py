"""One process of benchmarks/many_adapters.py: some adapters trained in one pass, or one adapter by the ordinary loop.

    python -m contenders.many_members RESULT --members 8 --batch 2 --steps 6 [--longest 40] [--loop] [--held-out]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorakeet.memory.import_cost import without_triton

with without_triton():  # as a command, which is within it all the time
    import torch
    from harness.steps import PACKAGES, installed, peak_bytes
    from rich.console import Console

    from lorakeet.config import read_run
    from lorakeet.kinds.text.assemble import TextAssembly, assemble_text
    from lorakeet.models.text.adapters import initialise_adapter
    from lorakeet.runs.output_paths import folder_above
    from lorakeet.train.log import read_metrics
    from lorakeet.train.loop import train
    from lorakeet.train.run import RunFolder
    from lorakeet.train.text.multi_adapter import Member, MultiAdapterTraining, train_many
    from lorakeet.train.text.task import TextTask
    from lorakeet.verbs.quickstart import config_path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--longest", type=int, help="only training rows of at most so many tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="evaluate on held-out rows after every second step")
    parser.add_argument("--loop", action="store_true", help="the loop of lorakeet finetune, of one adapter")
    given = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        flags = {
            "train.batch_size": str(given.batch), "train.steps": str(given.steps), "train.patience": "0",
            "train.checkpoint_every": str(given.steps), "train.evaluate_every": "2", "evaluate.baselines": "false",
            "out": f"{folder}/run",
        }  # fmt: skip
        setup = short_rows(assemble_text(read_run(config_path(), flags), Console(quiet=True)), given.longest)
        loaded = peak_bytes()
        found = _loop(setup, given) if given.loop else _many(setup, given)
    about = {"loaded_bytes": loaded, "peak_bytes": max(loaded, peak_bytes()), "threads": torch.get_num_threads()}
    given.result.write_text(json.dumps({**found, **about, "packages": installed(PACKAGES)}), encoding="utf-8")
    return 0


def short_rows(setup: TextAssembly, longest: int | None) -> TextAssembly:
    """The same with the training rows of at most `longest` tokens."""
    if longest is None:
        return setup
    kept = [example for example in setup.train.examples if len(example.ids) <= longest]
    return replace(setup, train=replace(setup.train, examples=kept))


def _many(setup: TextAssembly, given: argparse.Namespace) -> dict[str, Any]:
    """Members of different seeds and rates; seconds and tokens of each round."""
    members = []
    for number in range(given.members):
        rate = float(setup.config.train.learning_rate or 1e-3) * 2.0 ** (number % 4 - 2)
        spec = replace(setup.config.train, learning_rate=rate, seed=given.seed + number)
        initialise_adapter(setup.text, setup.plan, seed=spec.seed, name=f"member_{number}")
        members.append(Member(f"member_{number}", spec, setup.train.examples, _held_out(setup, given)))
    seconds, tokens, last = [], [], time.perf_counter()

    def watch(many: MultiAdapterTraining) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        tokens.append(sum(at.tokens for at in many.progress) - sum(tokens))
        last = now

    ended = train_many(setup.text, members, watch=watch, folder=folder_above(Path(setup.config.out)))
    return {"seconds": seconds, "tokens": tokens, "losses": [at.losses for at in ended]}


def _held_out(setup: TextAssembly, given: argparse.Namespace) -> Sequence[Any]:
    """The rows that are looked at, so that a member keeps its best values, as in a search; none where steps are timed."""
    return setup.held_out.examples if given.held_out else ()


def _loop(setup: TextAssembly, given: argparse.Namespace) -> dict[str, Any]:
    spec = replace(setup.config.train, seed=given.seed)
    initialise_adapter(setup.text, setup.plan, seed=spec.seed)
    run = RunFolder.create(Path(setup.config.out))
    train(TextTask(setup.text, setup.train.examples, held_out=_held_out(setup, given), spec=spec), spec, run=run)
    steps = [record for record in read_metrics(run.metrics) if "loss" in record]
    tokens = [record["tokens"] for record in steps]
    seconds = [count / record["tokens_per_second"] for count, record in zip(tokens, steps, strict=True)]
    return {"seconds": seconds, "tokens": tokens, "losses": [[record["loss"] for record in steps]]}


if __name__ == "__main__":
    raise SystemExit(main())

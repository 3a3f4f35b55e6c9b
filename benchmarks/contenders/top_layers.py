"""One process of benchmarks/frozen_prefix.py: the quickstart with adapters in the top layers, or in all.

    python -m contenders.top_layers RESULT --layers top:8 --epochs 3 [--limit 200] [--kept]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness.steps import PACKAGES, installed, peak_bytes
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.kinds.text.assemble import assemble_text, text_task
from lorakeet.models.text.cached_states import cached_states
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.verbs.quickstart import config_path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", action="store_true")
    given = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        flags = {
            "lora.layers": given.layers, "train.epochs": str(given.epochs), "data.limit": str(given.limit),
            "train.seed": str(given.seed), "train.patience": "0", "out": f"{folder}/run",
        }  # fmt: skip
        setup = assemble_text(read_run(config_path(), flags), Console(quiet=True))
        task, spec = text_task(setup), setup.config.train
        kept, filled, began = 0, 0.0, time.perf_counter()
        with ExitStack() as stack:
            if given.kept:
                rows = (*task.train, *task.held_out_rows)
                states = cached_states(setup.text, rows, folder=Path(folder), micro_tokens=spec.micro_tokens)
                kept, filled = stack.enter_context(states).bytes, time.perf_counter() - began
            outcome = train(task, spec, run=RunFolder.create(Path(folder) / "run"))
    found = {
        "seconds": filled + outcome.seconds, "of_them_filling": filled, "kept_bytes": kept, "steps": outcome.steps,
        "tokens": outcome.tokens, "held_out_loss": outcome.best_loss, "base_loss": outcome.base_loss,
        "trained_parameters": setup.plan.parameters, "peak_bytes": peak_bytes(), "threads": torch.get_num_threads(),
        "packages": installed(PACKAGES),
    }  # fmt: skip
    given.result.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

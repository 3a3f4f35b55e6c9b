"""Claim: `import lorakeet` and `lorakeet --help` answer at once, since torch is imported only where something is computed.

    python benchmarks/startup.py [--runs 15]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import rotated, run, summary

HELP_SECONDS = 0.5  # the promise for `lorakeet --help`

COMMANDS: dict[str, list[str]] = {
    "python alone": ["-c", "pass"],
    "import lorakeet": ["-c", "import lorakeet"],
    "lorakeet --help": ["-m", "lorakeet", "--help"],
    "lorakeet finetune --help": ["-m", "lorakeet", "finetune", "--help"],
    "import torch": ["-c", "import torch"],
    "import the training path": ["-c", "import lorakeet.verbs.finetune"],
    "import torch, transformers, peft": ["-c", "import torch, peft; from transformers import AutoModelForCausalLM"],
    "import TRL's SFTTrainer": ["-c", "from trl import SFTTrainer"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="measured runs of each command, after one that is not counted")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with TemporaryDirectory() as folder:
        for number in range(given.runs + 1):  # the first fills the disk cache and writes the bytecode
            for name in rotated(list(COMMANDS), number):
                took = run([sys.executable, *COMMANDS[name]], log=Path(folder) / "output.log")
                if number:
                    seconds[name].append(took)
    found = {name: summary(values) for name, values in seconds.items()}
    print(f"\nseconds, median of {given.runs} fresh processes (min-max)")
    for name, numbers in found.items():
        print(f"{name:34} {numbers.show(3)}")
    kept = found["lorakeet --help"].median < HELP_SECONDS
    print(f"\n`lorakeet --help` in under {HELP_SECONDS} s: {'yes' if kept else 'NO'}")
    content = {"seconds": {name: numbers.to_mapping() for name, numbers in found.items()}, "help_kept": kept}
    print(f"Written: {write_result('startup', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""A whole run of `lorakeet finetune` in a process of its own, with evaluation and certificate, its plan and the memory that it
used
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from lorakeet.config import read_run
from lorakeet.memory.measure import PeakMemory, peak_bytes
from lorakeet.verbs.finetune import FinetuneResult, finetune

ROWS = 48
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with TemporaryDirectory() as temporary:
        rows = write_rows(Path(temporary) / "rows.jsonl", asked["tokens"], labelled=asked["labelled"])
        config = read_run(None, {**asked["settings"], "data.train": str(rows), "out": str(Path(temporary) / "run")})
        before = peak_bytes()
        with PeakMemory(sample=True) as memory, (Path(temporary) / "said.txt").open("w", encoding="utf-8") as said:
            result = finetune(config, console=Console(file=said))  # whose own measure of training begins the peak anew
        used = max(before, memory.now(), peak_bytes())
    assert isinstance(result, FinetuneResult) and result.outcome is not None
    kept = result.setup.arrangement
    planned = kept.forecast.peak if kept.forecast is not None else kept.planned
    found = {"planned": planned, "used": used, "training": [kept.planned, result.outcome.peak_bytes]}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def write_rows(path: Path, tokens: int, *, labelled: bool) -> Path:
    """Rows of at least so many tokens: texts, or texts with one of two labels."""
    lines = []
    for number in range(ROWS):
        words = [WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(tokens)]
        record = {"text": f"Row {number}: {' '.join(words)}"}
        lines.append(json.dumps({**record, "label": "odd" if number % 2 else "even"} if labelled else record))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()

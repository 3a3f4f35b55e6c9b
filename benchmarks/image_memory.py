"""Claim: LoRA on the UNets of SD 1.5 (512²) and SDXL (1024²), batch 1, fits a GPU of 8 GB; and what the process takes on a CPU.

    python benchmarks/image_memory.py [--only TEXT] [--plan-only]

Shapes are the published ones, weights are random. Planned: the peak of tensor bytes, from the real training step run on shapes
(memory/ledger), with latents and text embeddings cached, so that neither autoencoder nor text encoders are in memory. Measured:
one real optimizer step in a process of its own, all of whose memory counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, write_result
from harness.processes import run_module

CARD = 8 * 10**9
MODULE = "contenders.image_step"
CONFIGURATIONS: tuple[dict[str, Any], ...] = tuple(
    {"shape": shape, "dtype": "bfloat16", "targets": targets, "checkpointing": checkpointing}
    for shape in ("SD 1.5", "SDXL")
    for targets in (["attention"], ["all-linear", "conv"])
    for checkpointing in (False, True)
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only configurations whose name holds this text")
    parser.add_argument("--plan-only", action="store_true", help="no real step: seconds instead of minutes")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about, lines = origin(), []
    with TemporaryDirectory(prefix="lorakeet-bench-") as temporary:
        for configuration in CONFIGURATIONS:
            if given.only not in name_of(configuration):
                continue
            line = {"name": name_of(configuration), "planned": child(configuration, Path(temporary), planned=True)}
            if not given.plan_only and configuration["checkpointing"]:
                line["measured"] = child(configuration, Path(temporary), planned=False)
            lines.append(line)
            show(line)
    fitting = {shape: any(line["planned"]["bytes"] <= CARD for line in lines if line["name"].startswith(shape))
               for shape in ("SD 1.5", "SDXL") if any(line["name"].startswith(shape) for line in lines)}  # fmt: skip
    print("\n" + ", ".join(f"{shape}: {'fits' if fits else 'DOES NOT FIT'} 8 GB" for shape, fits in fitting.items()))
    if not given.only and not given.plan_only:
        content = {"card_bytes": CARD, "fits": fitting, "configurations": lines}
        print(f"Written: {write_result('image_memory', content, seed=0, about=about, folder=given.results)}")
    return 0 if all(fitting.values()) else 1


def name_of(configuration: dict[str, Any]) -> str:
    kept = "recomputed" if configuration["checkpointing"] else "kept"
    return f"{configuration['shape']}, {'+'.join(configuration['targets'])}, activations {kept}"


def child(configuration: dict[str, Any], folder: Path, *, planned: bool) -> dict[str, Any]:
    asked, answer = folder / "asked.json", folder / "answer.json"
    asked.write_text(json.dumps({**configuration, "planned": planned}), encoding="utf-8")
    run_module(sys.executable, MODULE, [str(asked), str(answer)], log=folder / "log")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def show(line: dict[str, Any]) -> None:
    kinds = ", ".join(f"{kind} {count / 1e9:.2f}" for kind, count in line["planned"]["kinds"].items())
    text = f"{line['name']}: planned {line['planned']['bytes'] / 1e9:.2f} GB ({kinds})"
    if measured := line.get("measured"):
        text += f"; process {measured['peak'] / 1e9:.2f} GB at most ({measured['before'] / 1e9:.2f} before), "
        text += f"{measured['seconds']:.0f} s"
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

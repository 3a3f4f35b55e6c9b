"""Claim: a checkpoint costs little, and a run that was killed and resumed ends in the same bytes as one that was not.

    python benchmarks/resume.py [--kills 3]

A whole run of a few steps; then, `--kills` times, the same run, killed by SIGKILL at a random moment and resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import Failed, environment, run_module, summary

MODULE = "contenders.resumable_run"
SAVES = 7
PATIENCE = 600  # seconds that a run may take until the checkpoint after which it is killed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=3, help="how many runs are killed and resumed")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    with TemporaryDirectory(prefix="lorakeet-bench-") as temporary:
        folder = Path(temporary)
        whole, wanted, size = _whole(folder / "whole", given)
        killed = [_killed(folder / f"killed-{number}", given, number) for number in range(given.kills)]
        same = [learnt(folder / f"killed-{number}") == wanted for number in range(given.kills)]
    content = {
        "settings": {"steps": given.steps, "kills": given.kills},
        "checkpoint_bytes": size,
        "write_seconds": summary(whole["save_seconds"]).to_mapping(),
        "restore_seconds": summary(each["open_seconds"] for each in killed).to_mapping(),
        "start_to_first_new_step_seconds": summary(each["seconds_from_start_to_first_new_step"] for each in killed).to_mapping(),
        "killed_after": [each["killed_after"] for each in killed],
        "resumed_at_step": [each["begun_at_step"] for each in killed],
        "same_bytes": same,
        "adapter_sha256": wanted["adapter"],
    }
    _show(content)
    print(f"Written: {write_result('resume', content, seed=given.seed, about=about, folder=given.results)}")
    return 0 if all(same) else 1


def _whole(run: Path, given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, object], int]:
    """The uninterrupted run's measurements, its trained state, and the bytes of its last checkpoint."""
    print(f"one whole run of {given.steps} steps", file=sys.stderr, flush=True)
    result = run.with_suffix(".json")
    run_module(sys.executable, MODULE, [*_arguments(run, given), "--saves", str(SAVES)], log=run.with_suffix(".log"))
    last = max((run / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in last.iterdir())
    return json.loads(result.read_text(encoding="utf-8")), learnt(run), size


def _killed(run: Path, given: argparse.Namespace, number: int) -> dict[str, Any]:
    """Runs, kills after a random checkpoint and a random part of a second, resumes; what the resumed process measured."""
    chance = random.Random(given.seed * 1000 + number)
    step, delay = chance.randint(1, given.steps - 2), chance.random()
    print(f"killed {delay:.2f} s after the checkpoint of step {step}, then resumed", file=sys.stderr, flush=True)
    _kill_after(run, given, step, delay)
    run_module(sys.executable, MODULE, [*_arguments(run, given), "--resume"], log=run.with_suffix(".log"))
    found: dict[str, Any] = json.loads(run.with_suffix(".json").read_text(encoding="utf-8"))
    return {**found, "killed_after": f"{delay:.2f} s after the checkpoint of step {step}"}


def _kill_after(run: Path, given: argparse.Namespace, step: int, delay: float) -> None:
    awaited = run / "checkpoints" / f"step-{step:06d}"
    with run.with_suffix(".killed.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *_arguments(run, given)],
            env=environment(), cwd=run.parent, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not awaited.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise Failed(f"The run did not reach step {step}:\n" + run.with_suffix(".killed.log").read_text("utf-8")[-2000:])
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != -signal.SIGKILL:
        raise Failed(f"The run ended before it could be killed (code {process.returncode}); raise --steps.")


def _arguments(run: Path, given: argparse.Namespace) -> list[str]:
    options = {"--steps": given.steps, "--seed": given.seed, "--spawned": time.time()}
    return [str(run), str(run.with_suffix(".json")), *(text for pair in options.items() for text in map(str, pair))]


def learnt(run: Path) -> dict[str, object]:
    """All that must be equal: the adapter's bytes, the last checkpoint's tensors, and the losses of every step."""
    last = max((run / "checkpoints").glob("step-*"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "adapter": _sha256(run / "adapter" / "adapter_model.safetensors"),
        "checkpoint": {path.name: _sha256(path) for path in sorted(last.glob("*.safetensors"))},
        "losses": [(record["step"], record.get("loss", record.get("held_out_loss"))) for record in records],
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _show(content: dict[str, Any]) -> None:
    print(f"\ncheckpoint: {content['checkpoint_bytes'] / 1e6:.1f} MB (adapter, moments, best adapter, random states)")
    for name in ("write_seconds", "restore_seconds", "start_to_first_new_step_seconds"):
        numbers = content[name]
        label = name.removesuffix("_seconds").replace("_", " ")
        print(f"{label:26} {numbers['median']:.3f} s ({numbers['min']:.3f}-{numbers['max']:.3f}, n={numbers['n']})")
    for after, step, same in zip(content["killed_after"], content["resumed_at_step"], content["same_bytes"], strict=True):
        print(f"killed {after}, resumed at step {step}: {'the same bytes' if same else 'OTHER BYTES'}")


if __name__ == "__main__":
    sys.exit(main())

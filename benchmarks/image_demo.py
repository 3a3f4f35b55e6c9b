"""Claim: in ten minutes on 2 cores a small diffusion model is pre-trained, and adapters of 40 photos help on held-out photos.

    python benchmarks/image_demo.py [--cache FOLDER] [--quick]

Runs `python -m demos.fashion`, which is `make quickstart-images`, with an empty cache except for Fashion-MNIST's files, which are
fetched before the clock starts. Evaluated are each adapter on its own held-out photos, and both adapters' sum where neither was
trained: the new kind in the new look. The base is a small stand-in for Stable Diffusion, of the same classes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import REPOSITORY, origin, warn_if_busy, write_result
from harness.processes import environment

from lorakeet.evaluate.report.report import read_report

PRETRAINED = 600.0  # seconds that the base may take
HELPED = (("kind-held-out", "kind"), ("look-held-out", "look"), ("both-held-out", "both"))  # photos, and what helps on them
FETCH = "import sys; from pathlib import Path; from demos.fashion.photos import load_photos; load_photos(Path(sys.argv[1]))"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="a folder of the demo, for its photos alone; without it they are fetched")
    parser.add_argument("--quick", action="store_true", help="drawn pictures and few steps, to try the script")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        cache, out = Path(folder) / "cache", Path(folder) / "out"
        if given.quick:
            pass
        elif given.cache:
            shutil.copytree(given.cache / "fashion-mnist", cache / "fashion-mnist")
        else:
            run_here(["-c", FETCH, str(cache)], Path(folder))
        about = origin()
        print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
        run_here(["-m", "demos.fashion", "--cache", str(cache), "--out", str(out), *["--quick"] * given.quick], Path(folder))
        seconds, crossed = (json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in ("seconds", "crossed"))
        certificates = {name: read_report(out / name / "report.json").certificate for name in ("kind", "look")}
    print("seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items()))
    for photos, found in crossed.items():
        gaps = [f"{name} {one['difference']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})" for name, one in _gaps(found)]
        print(f"{photos}: base {found['base']:.4f}; " + ", ".join(gaps))
    kept = seconds["base"] <= PRETRAINED and all(crossed[photos][name]["verdict"] == "better" for photos, name in HELPED)
    certified = {name: found is not None and found.passed for name, found in certificates.items()}
    content = {"seconds": seconds, "crossed": crossed, "certified": certified, "kept": kept and all(certified.values())}
    claim = "image_demo_quick" if given.quick else "image_demo"
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=given.results)}")
    return 0 if content["kept"] else 1


def run_here(arguments: Sequence[str], folder: Path) -> None:
    """This Python on the repository's demo; SystemExit with what it said where that fails."""
    command = [sys.executable, "-u", *arguments]
    settings = {**environment(), "LORAKEET_CACHE": str(folder / "lorakeet")}
    if subprocess.run(command, cwd=REPOSITORY, env=settings, check=False).returncode:
        raise SystemExit(f"{' '.join(arguments)} failed; see above")


def _gaps(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, one in found.items() if isinstance(one, dict)]


if __name__ == "__main__":
    sys.exit(main())

"""What a result must say about its origin: machine, commit, seed; and where it is written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "bf16")


def machine() -> dict[str, Any]:
    """The machine in numbers, and how busy it is now: timings on a busy one are worth nothing."""
    cpu = _cpu()
    return {
        "cpu": cpu["name"],
        "features": cpu["features"],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether the package differed from it."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        changed = bool(_git("status", "--porcelain", "--", "src", "examples", "benchmarks", ":!benchmarks/results"))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "changed": True}
    return {"commit": name, "changed": changed}


def write_result(claim: str, content: Mapping[str, Any], *, seed: int, about: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes CLAIM.CPU.COMMIT.seedN.json; `about` is what `origin` gave when the run began."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", str(about["machine"]["cpu"]).lower()).strip("-")
    which = f"{about['commit']['commit']}{'+changes' if about['commit']['changed'] else ''}"
    path = folder / f"{claim}.{slug}-{about['machine']['cores']}-cores.{which}.seed{seed}.json"
    text = json.dumps({"claim": claim, "seed": seed, **about, **content}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def origin() -> dict[str, Any]:
    """Machine, commit and time, as they are when a benchmark begins."""
    return {"machine": machine(), "commit": commit(), "began": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def warn_if_busy(about: Mapping[str, Any]) -> str:
    """A sentence when other work is running, else nothing."""
    load = about["machine"]["load_average"]
    return f"The load average is {load} before the first run: these timings are not to be trusted." if load > 0.5 else ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {"name": platform.processor() or platform.machine(), "features": []}
    found = dict(reversed([_pair(line) for line in text.splitlines()]))  # of the first processor
    name = found.get("model name") or platform.machine()
    if "cpu family" in found:  # clouds call several generations by one name
        name += f" (family {found['cpu family']}, model {found.get('model', '?')})"
    present = set((found.get("flags") or found.get("Features") or "").split())
    return {"name": name, "features": [feature for feature in _FEATURES if feature in present]}


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), " ".join(value.split())

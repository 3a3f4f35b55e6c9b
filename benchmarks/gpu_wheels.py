"""Fetches what a GPU machine without a network lacks, as wheels in a folder that is carried there. `make gpu-wheels`.

    python benchmarks/gpu_wheels.py [--out gpu-wheels] [--python 3.12] [--cuda 130]

Packages are fetched by their names through pip alone, without what they depend on: torch for CUDA, and with it most of it, is on
such a machine. bitsandbytes is kept with its library for one version of CUDA, which leaves 4 of 60 MB. All of it is to stay
below 64 MiB together with the source tree.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a machine with torch 2.11+cu130, Triton 3.6 and transformers 5.17 lacks, with the releases that Lorakeet is tested with.
PACKAGES = (
    "transformers>=5.24,<6", "peft>=0.21.2,<0.22", "bitsandbytes>=0.50.2,<0.51", "liger-kernel>=0.8.5,<0.9",
    "diffusers>=0.42.1,<0.43", "trl>=1.16,<2", "datasets>=5,<6", "dill<0.4.2", "multiprocess<0.70.20", "importlib_metadata",
)  # fmt: skip
PLATFORMS = tuple(f"manylinux{each}_x86_64" for each in ("_2_34", "_2_28", "_2_27", "_2_24", "_2_17", "2014"))
MOST = 64 << 20  # bytes, with the tree
LIBRARY = "bitsandbytes/libbitsandbytes_"

Run = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str] | None = None, run: Run = subprocess.call) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-wheels", help="the folder of wheels")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--cuda", default="130", help="version of CUDA there, without a dot")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for old in given.out.glob("*.whl"):  # two versions of one package would stop the installation
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(given.out)]
    command += ["--python-version", given.python, "--implementation", "cp", *(f"--platform={each}" for each in PLATFORMS)]
    if code := run([*command, *PACKAGES]):
        print(f"pip ended with code {code}; {given.out} is not complete. Is there a network here?", file=sys.stderr)
        return 1
    for wheel in given.out.glob("bitsandbytes-*.whl"):
        keep_library(wheel, f"cuda{given.cuda}")
    wheels, tree = sum(map(_size, given.out.glob("*.whl"))), sum(map(_size, tracked()))
    print(f"{given.out}: {wheels / 2**20:.1f} MiB, and the tree {tree / 2**20:.1f} MiB, of at most {MOST >> 20}.")
    for wheel in sorted(given.out.glob("*.whl")):
        print(f"  {_size(wheel) / 2**20:6.1f} MiB  {wheel.name}")
    return 0 if wheels + tree <= MOST else 1


def keep_library(wheel: Path, cuda: str) -> None:
    """Writes the wheel of bitsandbytes anew with its libraries for the CPU and for one CUDA alone, and its list of files so.

    ValueError if it has no library for that CUDA.
    """
    kept = (f"{LIBRARY}cpu", f"{LIBRARY}{cuda}")
    beside = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        if not any(name.startswith(kept[1]) for name in names):
            beside.unlink()
            there = ", ".join(name for name in names if LIBRARY in name)
            raise ValueError(f"{wheel.name} has no library {kept[1]}….so; it has {there}")
        gone = {name for name in names if name.startswith(LIBRARY) and not name.startswith(kept)}
        for name in names:
            if name in gone:
                continue
            content = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode("utf-8").splitlines(keepends=True)
                content = "".join(line for line in lines if line.partition(",")[0] not in gone).encode("utf-8")
            new.writestr(old.getinfo(name), content, zipfile.ZIP_DEFLATED)
    beside.replace(wheel)


def tracked() -> Iterator[Path]:
    """The files of the source tree that git knows."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return
    yield from (ROOT / name for name in found.split("\0") if name)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


if __name__ == "__main__":
    sys.exit(main())

"""The C files beside this one as a library, compiled by the machine's own gcc when they are first used, and kept from then on.

They are for processors that multiply bf16 numbers (AVX512_BF16), on Linux. Where that, or a compiler, is missing, torch's own
operations compute the same to rounding; `why_not` says what is missing. Threads are those of torch: the library is linked to the
OpenMP that torch has loaded, since a second one would have threads of its own, waiting in the way of the first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = ("attention.c", "passes.c")
FLAGS = ("-O3", "-march=x86-64-v4", "-mavx512bf16", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-fvisibility=default")
WANTED = "avx512_bf16"  # as /proc/cpuinfo has it; such a processor has all of x86-64-v4
SECONDS = 120  # more than a compilation takes on a busy machine
OFF = "LORAKEET_NATIVE"  # an environment variable: 0 leaves the library out


class CannotBuild(Exception):
    """There is no library here; the message says why."""


@functools.cache
def why_not() -> str:
    """Why the library cannot be had here, in words; empty where it can. Compiles it if nobody has yet."""
    try:
        _library()
    except CannotBuild as error:
        return str(error)
    return ""


def library() -> ctypes.CDLL | None:
    """The library; None where it cannot be had."""
    return None if why_not() else _library()


@functools.cache
def _library() -> ctypes.CDLL:
    if os.environ.get(OFF) == "0":
        raise CannotBuild(f"{OFF} is 0")
    if sys.platform != "linux" or platform.machine() != "x86_64" or WANTED not in _processor():
        raise CannotBuild("the processor has no AVX512_BF16, or the system is not Linux")
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise CannotBuild("there is no gcc; install it to train faster, on Debian with: apt install gcc")
    found = ctypes.CDLL(str(_built(compiler)))
    found.attention_scratch.restype = ctypes.c_int64
    return found


@functools.cache
def _processor() -> frozenset[str]:
    """What the processor can do, in the words of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = (line.split(":", 1) for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, ["", ""])[1].split())


def _built(compiler: str) -> Path:
    """The library's file, in the user's cache, or where that cannot be written in a folder of this process alone."""
    openmp = _openmp()
    texts = [(HERE / name).read_bytes() for name in ("lanes.h", *SOURCES)]
    said = _run([compiler, "--version"])
    key = hashlib.sha256(b"\0".join([*texts, " ".join(FLAGS).encode(), said.encode(), str(openmp).encode()])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakeet"
    for folder in (cache, Path(tempfile.mkdtemp(prefix="lorakeet-"))) if not _writable(cache) else (cache,):
        target = folder / f"native-{key}.so"
        if target.exists():
            return target
    return _compile(compiler, openmp, target)


def _writable(folder: Path) -> bool:
    """Whether the folder is there, or can be made, and is ours to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _compile(compiler: str, openmp: Path, target: Path) -> Path:
    """Compiles beside `target` and moves it there, so that processes that start together do not meet."""
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as name:
        objects = []
        for source in SOURCES:
            objects.append(str(Path(name) / source.replace(".c", ".o")))
            _run([compiler, *FLAGS, "-c", str(HERE / source), "-o", objects[-1]])
        made = Path(name) / target.name
        _run([compiler, "-shared", *objects, str(openmp), "-lm", "-o", str(made)])
        os.replace(made, target)
    return target


def _openmp() -> Path:
    """The GNU OpenMP that torch has loaded into this process: its own, else the system's; other packages bring more of them."""
    text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    loaded = {Path(line.split(maxsplit=5)[-1]) for line in text.splitlines() if "/libgomp" in line}
    own = [path for path in loaded if path.is_relative_to(Path(torch.__file__).parent)]
    others = [path for path in loaded if not path.parent.name.endswith(".libs")]
    for path in sorted(own) or sorted(others):
        return path
    raise CannotBuild("this torch does not use GNU OpenMP")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        last = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise CannotBuild(f"{Path(command[0]).name} cannot compile Lorakeet's kernels ({last.strip()}); gcc 12 or later can")
    return done.stdout

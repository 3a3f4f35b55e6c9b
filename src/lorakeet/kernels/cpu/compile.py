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
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lorakeet.kernels.cache import cache_folder

HERE = Path(__file__).parent
HEADERS = ("lanes.h", "elementwise.h", "pairs.h", "panels.h", "cached.h", "attention.h", "tiles.h", "dense.h",
           "unpack_panels.h", "stored.h", "gptq.h", "int8_rows.h", "trained_pairs.h")
SOURCES = ("attention.c", "elementwise.c", "pairs.c", "panels.c", "cached.c", "block.c", "int8_rows.c", "dense.c",
           "unpack_panels.c", "stored.c", "gguf.c", "head.c", "trained_pairs.c", "trained_block.c")
SIZES = ("attention_scratch", "coded_scratch", "dense_scratch", "block_scratch", "trained_block_kept", "trained_block_scratch")
INSTRUCTIONS = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
FLAGS = ("-O3", *INSTRUCTIONS, "-falign-loops=64", "-ffp-contract=fast", "-fno-strict-aliasing", "-fopenmp", "-fPIC")
WANTED = frozenset({"avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})  # in /proc/cpuinfo
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


def suits_machine() -> bool:
    """Whether the library is for this machine, were there a compiler."""
    return not _lacks()


def has(feature: str) -> bool:
    """Whether the processor has a feature, in the words of /proc/cpuinfo."""
    return feature in _processor()


@functools.cache
def _lacks() -> str:
    """What the machine lacks for it, in words; empty where it lacks nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the system is not Linux on x86-64"
    missing = WANTED - _processor()
    return f"the processor has no {', '.join(sorted(missing))}" if missing else ""


@functools.cache
def _library() -> ctypes.CDLL:
    if os.environ.get(OFF) == "0":
        raise CannotBuild(f"{OFF} is 0")
    if lacks := _lacks():
        raise CannotBuild(lacks)
    compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    if shutil.which(compiler[0]) is None:
        raise CannotBuild(f"there is no {compiler[0]}; install gcc, on Debian with: apt install gcc")
    try:
        return _loaded(compiler)
    except (OSError, RuntimeError, AttributeError) as error:  # a full disk, no home, a file or a symbol that is not there
        raise CannotBuild(f"Lorakeet's kernels cannot be compiled or loaded ({error})") from error


@functools.cache
def _processor() -> frozenset[str]:
    """What the processor can do, in the words of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = (line.split(":", 1) for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, ["", ""])[1].split())


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The library from the cache, where it is compiled if it is not there; without a cache, from a folder that goes away."""
    openmp = _openmp()
    texts = [(HERE / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    told = *FLAGS, *compiler, _run([*compiler, "--version"]), str(openmp)
    digest = hashlib.sha256(b"/".join([*texts, *(each.encode() for each in told)])).hexdigest()
    name = f"native-{digest[:16]}.so"
    cache = cache_folder() / "native"
    if not _own(cache):
        with tempfile.TemporaryDirectory(prefix="lorakeet-") as folder:
            return _opened(_compile(compiler, openmp, Path(folder) / name))
    target = cache / name
    if target.exists():
        try:
            return _opened(target)
        except (OSError, AttributeError):
            target.unlink()  # it was not written to its end
    return _opened(_compile(compiler, openmp, target))


def _own(folder: Path) -> bool:
    """Whether the folder is there, or can be made, and nobody else can write into it: what lies there is run."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK)


def _opened(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in SIZES:
        getattr(found, name).restype = ctypes.c_int64
    return found


def _compile(compiler: list[str], openmp: Path, target: Path) -> Path:
    """Compiles beside `target` and moves it there when it is on the disk, so that processes that start together do not meet."""
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as name:
        objects = []
        for source in SOURCES:
            objects.append(str(Path(name) / source.replace(".c", ".o")))
            _run([*compiler, *FLAGS, "-c", str(HERE / source), "-o", objects[-1]])
        made = Path(name) / target.name
        _run([*compiler, "-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", *objects, str(openmp), "-lm", "-o", str(made)])
        with made.open("rb") as written:
            os.fsync(written.fileno())
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
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        last = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise CannotBuild(f"{Path(command[0]).name} cannot compile Lorakeet's kernels ({last.strip()}); gcc 12 or later can")
    return done.stdout

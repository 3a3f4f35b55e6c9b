"""The C files of the folder c/ as a library, compiled by the machine's own gcc at first use and cached.

They need a processor that multiplies bf16 numbers (AVX512_BF16), on Linux. Without that, or without a compiler, torch's own
operations compute the same to rounding; `why_not` says what is missing. The library is linked to the OpenMP that torch has
loaded: a second OpenMP would have threads of its own, which compete with torch's.
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

from lorakeet.disk import written_whole
from lorakeet.kernels.cache import cache_folder

C_FILES = Path(__file__).parent / "c"
INCLUDE = C_FILES / "include"
HEADERS = ("lanes.h", "elementwise.h", "pairs.h", "panels.h", "cached.h", "attention.h", "tiles.h", "dense.h",
           "unpack_panels.h", "stored.h", "gptq.h", "int8_rows.h", "trained_pairs.h")
SOURCES = ("attention.c", "elementwise.c", "pairs.c", "panels.c", "cached.c", "block.c", "int8_rows.c", "dense.c",
           "unpack_panels.c", "stored.c", "gguf.c", "head.c", "trained_pairs.c", "trained_block.c")
SIZES = ("attention_scratch", "int8_scratch", "dense_scratch", "block_scratch", "trained_block_saved", "trained_block_scratch")
INSTRUCTIONS = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
FLAGS = ("-O3", *INSTRUCTIONS, "-falign-loops=64", "-ffp-contract=fast", "-fno-strict-aliasing", "-fopenmp", "-fPIC")
WANTED = frozenset({"avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})  # in /proc/cpuinfo
SECONDS = 120  # more than a compilation takes on a busy machine
OFF = "LORAKEET_NATIVE"  # an environment variable: 0 leaves the library out


class CannotBuild(Exception):
    """The library cannot be built here; the message says why."""


@functools.cache
def why_not() -> str:
    """Why the library is not available here; empty if it is. Compiles it if needed."""
    try:
        _library()
    except CannotBuild as error:
        return str(error)
    return ""


def library() -> ctypes.CDLL | None:
    """The library; None if it is not available."""
    return None if why_not() else _library()


def suits_machine() -> bool:
    """True if the processor and the system can run the library, were there a compiler."""
    return not _lacks()


def has(feature: str) -> bool:
    """True if the processor has a feature, by its name in /proc/cpuinfo."""
    return feature in _processor()


@functools.cache
def _lacks() -> str:
    """What the machine lacks for the library; empty if nothing."""
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
    """The processor's features, by their names in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = (line.split(":", 1) for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, ["", ""])[1].split())


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The library from the cache, compiled first if needed; without a usable cache, from a temporary folder."""
    openmp = _openmp()
    texts = [*((INCLUDE / name).read_bytes() for name in HEADERS), *((C_FILES / name).read_bytes() for name in SOURCES)]
    given = *FLAGS, *compiler, _run([*compiler, "--version"]), str(openmp)
    digest = hashlib.sha256(b"/".join([*texts, *(each.encode() for each in given)])).hexdigest()
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
            target.unlink()  # an unfinished file
    return _opened(_compile(compiler, openmp, target))


def _own(folder: Path) -> bool:
    """True if the folder exists or can be made, and no other user can write into it: its files are executed."""
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
    """Compiles beside `target` and moves the finished file there, so that processes that start together do not collide."""
    with written_whole(target) as made:
        objects = []
        for source in SOURCES:
            objects.append(str(made.with_name(source.replace(".c", ".o"))))
            _run([*compiler, *FLAGS, f"-I{INCLUDE}", "-c", str(C_FILES / source), "-o", objects[-1]])
        _run([*compiler, "-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", *objects, str(openmp), "-lm", "-o", str(made)])
    return target


def _openmp() -> Path:
    """The GNU OpenMP that torch has loaded into this process: its own, else the system's. Other packages bring more of them."""
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
